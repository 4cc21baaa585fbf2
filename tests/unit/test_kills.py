"""What ``make kills`` looks for can be found: a run that resumes one step too late ends in other bytes."""

from pathlib import Path

from proof.kills import differences, spoilt
from support.tiny_world import tiny_spec
from support.training import Lay, contents, newest

from storage.local import read_checkpoint, step_dir
from trainer.attempt import run_attempt
from trainer.rundir import EXIT_COMPLETE
from trainer.stop import Stop


def test_a_run_that_resumes_one_step_too_late_is_found_out(world: Path, lay: Lay, tmp_path: Path) -> None:
    base = {"max_train_steps": 3, "train_batch_size": 1, "gradient_accumulation_steps": 1}
    spec = tiny_spec(world / "base", world / "images", base=base)

    def ended(name: str, resume: Path | None = None) -> dict[str, bytes]:
        run_dir = lay(name, spec, resume=resume, every_steps=1)
        assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
        return contents(newest(run_dir))

    calm = ended("calm")
    first = read_checkpoint(tmp_path / "calm" / "checkpoints" / step_dir(1))
    assert first

    assert differences(calm, ended("resumed", first.path)) == []
    found = differences(calm, ended("too late", spoilt(first, tmp_path / "spoilt")))
    assert "adapter.safetensors differs" in found


def test_each_file_that_is_not_the_same_is_named() -> None:
    expected, found = {"a": b"1", "b": b"1", "c": b"1"}, {"b": b"2", "c": b"1", "d": b"1"}

    assert differences(expected, found) == ["a is missing", "b differs", "d is there, and should not be"]
