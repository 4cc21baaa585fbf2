"""What a run leaves: metrics, samples, scores; what it refuses; what must not change its result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_world import build_base, build_images, tiny_spec
from support.training import Lay, StopAtStep, contents, events, newest

from storage.local import Manifest
from trainer.attempt import prepare, run_attempt
from trainer.cache import Cache, cache_key
from trainer.config import RunSpec
from trainer.dataset.folder import dataset_digest
from trainer.errors import BadInput, Diverged, EvaluationFailed
from trainer.evaluate import evaluate, scores
from trainer.families import load_family
from trainer.model_files import model_digest
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.snapshot import Progress
from trainer.stop import Stop

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLES = {"prompts": ["a dog", "a [trigger]"], "seeds": [1, 2], "steps": 2}
COUNT = "import json,pathlib,sys; n=len(list(pathlib.Path(sys.argv[1]).glob('*.png'))); "
"""Counts the samples; what follows prints the scores."""


@pytest.fixture
def spec(world: Path) -> RunSpec:
    return tiny_spec(
        world / "base",
        world / "images",
        base={"max_train_steps": 2},
        dataset={"trigger": "rufus"},
        samples=SAMPLES,
        evaluate={"command": ["python", "-c", COUNT + "print(json.dumps({'count': n}))", "{samples}"]},
    )


def manifest(checkpoint: Path) -> Manifest:
    return Manifest.model_validate_json((checkpoint / "manifest.json").read_bytes())


def test_the_final_checkpoint_carries_losses_and_scores(lay: Lay, spec: RunSpec) -> None:
    run_dir = lay("run", spec)
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE

    final = manifest(newest(run_dir))
    (validation,) = events(run_dir, "validation")
    assert final.final
    assert final.metrics.keys() == {"train/loss", "val/loss", "count"}
    assert final.metrics["count"] == 4
    assert final.metrics["val/loss"] == validation["val/loss"]
    losses = [event["loss"] for event in events(run_dir, "step")]
    assert final.metrics["train/loss"] == pytest.approx(sum(losses) / 2)
    index = json.loads((run_dir.samples / "step-000000002" / "index.json").read_text())
    assert index == [
        {"file": "p00-s1.png", "prompt": "a dog", "seed": 1},
        {"file": "p00-s2.png", "prompt": "a dog", "seed": 2},
        {"file": "p01-s1.png", "prompt": "a rufus", "seed": 1},
        {"file": "p01-s2.png", "prompt": "a rufus", "seed": 2},
    ]
    names = [event["event"] for event in events(run_dir)]
    assert names == ["started", *["step"] * 2, "validation", "samples", "score", "checkpoint", "complete"]


def test_sampling_and_validating_on_the_way_change_nothing(lay: Lay, spec: RunSpec) -> None:
    plain = lay("plain", spec)
    watched = lay(
        "watched",
        spec.model_copy(
            update={
                "samples": spec.samples.model_copy(update={"every": 1}) if spec.samples else None,
                "validation": spec.validation.model_copy(update={"every": 1}),
            }
        ),
        every_steps=1,
    )
    for run_dir in (plain, watched):
        assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE

    assert [event["step"] for event in events(watched, "samples")] == [1, 2]
    assert [event["step"] for event in events(watched, "validation")] == [1, 2]
    ends = [contents(newest(run_dir)) for run_dir in (plain, watched)]
    assert ends[0]["adapter.safetensors"] == ends[1]["adapter.safetensors"]
    assert ends[0].keys() == {"adapter.safetensors", "manifest.json", "state.json"}
    first = next(path for path in watched.checkpoints.iterdir() if path.name == "step-000000001")
    assert manifest(first).metrics.keys() == {"train/loss", "val/loss"}


def test_a_stop_while_the_command_runs_saves_the_last_step_for_the_next_attempt(
    lay: Lay, spec: RunSpec
) -> None:
    straight, stopped = lay("straight", spec), lay("stopped", spec)
    run_attempt(straight, Stop())

    class StopOnceSampled(Stop):
        @property
        def requested(self) -> bool:
            return bool(events(stopped, "samples"))

    assert run_attempt(stopped, StopOnceSampled()) == EXIT_PREEMPTED
    assert not manifest(newest(stopped)).final
    assert newest(stopped).name == "step-000000002"

    again = lay("again", spec, resume=newest(stopped))
    assert run_attempt(again, Stop()) == EXIT_COMPLETE
    assert manifest(newest(again)) == manifest(newest(straight)).model_copy(
        update={"files": manifest(newest(again)).files}
    )
    assert (newest(again) / "adapter.safetensors").read_bytes() == (
        newest(straight) / "adapter.safetensors"
    ).read_bytes()


def test_samples_that_a_stop_cut_short_are_drawn_by_the_next_attempt(lay: Lay, spec: RunSpec) -> None:
    assert spec.samples
    often = spec.model_copy(
        update={"samples": spec.samples.model_copy(update={"every": 1}), "evaluate": None}
    )
    stopped = lay("stopped", often)
    assert run_attempt(stopped, StopAtStep(stopped, 1)) == EXIT_PREEMPTED
    assert events(stopped, "samples") == []

    again = lay("again", often, resume=newest(stopped))
    run_attempt(again, Stop())

    assert [event["step"] for event in events(again, "samples")] == [1, 2]


def test_a_validation_that_a_stop_cut_short_is_done_by_the_next_attempt(lay: Lay, spec: RunSpec) -> None:
    often = spec.model_copy(update={"validation": spec.validation.model_copy(update={"every": 1})})
    often = often.model_copy(update={"samples": None, "evaluate": None})
    straight, stopped = lay("straight", often), lay("stopped", often)
    run_attempt(straight, Stop())
    assert run_attempt(stopped, StopAtStep(stopped, 1)) == EXIT_PREEMPTED
    assert events(stopped, "validation") == []

    again = lay("again", often, resume=newest(stopped))
    run_attempt(again, Stop())

    assert events(again, "validation") == events(straight, "validation")
    assert [event["step"] for event in events(again, "validation")] == [1, 2]
    assert contents(newest(again)) == contents(newest(straight))


def test_a_validation_is_done_once(lay: Lay, spec: RunSpec) -> None:
    often = spec.model_copy(update={"validation": spec.validation.model_copy(update={"every": 1})})
    often = often.model_copy(update={"samples": None, "evaluate": None})
    run_dir = lay("run", often, every_steps=1)
    run_attempt(run_dir, Stop())

    again = lay("again", often, resume=run_dir.checkpoints / "step-000000001")
    run_attempt(again, Stop())

    assert [event["step"] for event in events(again, "validation")] == [2]


def test_a_checkpoint_without_the_validated_step_is_read() -> None:
    """Written before there was this field."""
    assert Progress.model_validate_json('{"version": 1, "step": 3}').validated_step == 0


def test_a_failed_evaluation_keeps_the_trained_adapter(lay: Lay, spec: RunSpec) -> None:
    assert spec.evaluate
    fails = spec.evaluate.model_copy(update={"command": ("python", "-c", "raise SystemExit(3)")})
    run_dir = lay("run", spec.model_copy(update={"evaluate": fails}))

    with pytest.raises(EvaluationFailed, match=r"exit code 3; .*: orchestrate logs"):
        run_attempt(run_dir, Stop())

    assert newest(run_dir).name == "step-000000002"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('fine')", "its last line of output is 'fine'"),
        ("", "its last line of output is ''"),
        ("print('{}')", "its last line of output is '{}'"),
        ("print('{\"a\": true}')", "its last line of output is"),
        ("print('{\"a\": NaN}')", "its last line of output is"),
        ("import time; time.sleep(60)", "no result in 0.2 s"),
    ],
)
def test_commands_without_scores_are_refused(program: str, said: str, spec: RunSpec, tmp_path: Path) -> None:
    assert spec.evaluate
    command = spec.evaluate.model_copy(
        update={"command": ("python", "-c", program), "timeout_s": 0.2 if "sleep" in program else 60.0}
    )

    with pytest.raises(EvaluationFailed) as caught:
        evaluate(command, tmp_path, Stop())

    assert said in str(caught.value)


def test_scores_are_on_the_last_line() -> None:
    assert scores('working\n{"a": 1, "b/c": 0.5}\n') == {"a": 1.0, "b/c": 0.5}


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_adapter(world: Path, lay: Lay) -> None:
    spec = tiny_spec(
        world / "base",
        world / "images",
        base={"learning_rate": 1e30, "lr_warmup_steps": 0, "max_train_steps": 9},
    )
    run_dir = lay("run", spec, every_steps=1)

    with pytest.raises(Diverged, match=r"step 1: the norm of what is trained is inf"):
        run_attempt(run_dir, Stop())
    assert list(run_dir.checkpoints.iterdir()) == [], "nobody can go on from there"

    run_dir = lay("saved at the end only", spec)
    with pytest.raises(Diverged, match=r"step \d+: loss nan"):
        run_attempt(run_dir, Stop())
    assert list(run_dir.checkpoints.iterdir()) == []


def test_training_lowers_the_validation_loss(world: Path, lay: Lay) -> None:
    ends = []
    for rate in (1e-9, 1e-2):
        base = {"max_train_steps": 12, "learning_rate": rate, "gradient_accumulation_steps": 1}
        run_dir = lay(str(rate), tiny_spec(world / "base", world / "images", base=base))
        run_attempt(run_dir, Stop())
        ends.append(manifest(newest(run_dir)).metrics["val/loss"])

    assert ends[1] < ends[0] - 0.005


def test_a_v_prediction_model_is_trained_towards_v(lay: Lay, world: Path, tmp_path: Path) -> None:
    base = build_base(tmp_path / "v", prediction_type="v_prediction")
    run_dir = lay("run", tiny_spec(base, world / "images", base={"max_train_steps": 2}))

    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    assert prepare(run_dir, Stop()).family.process.prediction_type == "v_prediction"


def test_a_changed_dataset_is_refused(world: Path, lay: Lay, tmp_path: Path) -> None:
    images = build_images(tmp_path / "images")
    spec = tiny_spec(world / "base", images, dataset={"digest": dataset_digest(images)})
    assert prepare(lay("before", spec), Stop()).spec == spec
    (images / "00.txt").write_text("another caption")

    with pytest.raises(BadInput, match="its files differ from those at submission"):
        prepare(lay("after", spec), Stop())


def test_a_damaged_cache_entry_is_computed_again(tmp_path: Path) -> None:
    cache, key, computed = Cache(tmp_path), cache_key(kind="test", n=1), []

    def compute() -> dict[str, torch.Tensor]:
        computed.append(1)
        return {"x": torch.arange(6.0).view(2, 3)}

    first = cache.through(key, compute)["x"]
    assert torch.equal(cache.through(key, compute)["x"], first)
    assert len(computed) == 1
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        entry.write_bytes(damaged)
        assert torch.equal(cache.through(key, compute)["x"], first)
        assert entry.read_bytes() == whole
    assert len(computed) == 4
    assert list(tmp_path.rglob(".tmp*")) == []


def test_a_full_cache_is_used_and_a_changed_image_is_not(world: Path, lay: Lay, tmp_path: Path) -> None:
    images = build_images(tmp_path / "images")
    spec = tiny_spec(world / "base", images)
    before = prepare(lay("before", spec), Stop())
    entries = len(list((world / "cache").rglob("*.safetensors")))
    again = prepare(lay("again", spec), Stop())
    assert len(list((world / "cache").rglob("*.safetensors"))) == entries
    assert torch.equal(again.training.batches(0, 4)[0].x0_BCHW, before.training.batches(0, 4)[0].x0_BCHW)

    from PIL import Image

    Image.new("RGB", (40, 32), "red").save(images / "00.png")
    prepare(lay("changed", spec), Stop())
    assert len(list((world / "cache").rglob("*.safetensors"))) == entries + 2  # as it is, and mirrored


def test_a_fresh_adapter_changes_nothing_and_follows_from_the_seed(world: Path, lay: Lay) -> None:
    spec = tiny_spec(world / "base", world / "images")
    bare = load_family(spec.base)
    torch.manual_seed(1)
    parts = prepare(lay("one", spec), Stop())
    torch.manual_seed(2)
    other = prepare(lay("two", spec), Stop())
    (batch,) = parts.training.batches(0, 4)
    inputs = (batch.x0_BCHW, batch.timesteps_B, parts.texts.conditioning(batch.captions))

    with torch.no_grad():
        parts.family.denoiser.eval()
        assert torch.equal(parts.family.predict(*inputs), bare.predict(*inputs))
    for name, parameter in parts.methods.parameters.items():
        assert torch.equal(parameter, other.methods.parameters[name])
        assert (".lora_A." in name) == bool(parameter.any())


def test_a_base_model_that_changed_since_submission_is_refused(lay: Lay, world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    spec = tiny_spec(base, world / "images", base={"digest": model_digest(base)})
    prepare(lay("same", spec), Stop())

    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    with pytest.raises(BadInput, match="its files differ from those at submission"):
        prepare(lay("changed", spec), Stop())
