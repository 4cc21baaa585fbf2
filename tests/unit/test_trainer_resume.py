"""An interrupted run ends in the same bytes as one that was never interrupted."""

import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.open_files import no_files_to_open
from support.tiny_world import build_images, tiny_spec
from support.training import Lay, StopAtStep, contents, events, newest
from torch import Tensor

from trainer.attempt import run_attempt
from trainer.batch import Batch
from trainer.config import RunSpec
from trainer.errors import BadCheckpoint
from trainer.process import serve
from trainer.rundir import EXIT_BAD_CHECKPOINT, EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.snapshot import read_adapter, read_progress
from trainer.step import Stepper
from trainer.stop import Stop

EIGHT_BIT = {"optimizer": "adamw8bit", "adam8bit_min_size": 64}
"""The tiny adapter's matrices have 32 to 512 elements: most get 8-bit state, some do not."""


def spec_of(world: Path, **base: Any) -> RunSpec:
    return tiny_spec(world / "base", world / "images", base=base)


def several_shapes(folder: Path) -> Path:
    """Images of which some are wide and some are tall."""
    for file in sorted(build_images(folder, size=(48, 24)).glob("*.png"))[::2]:
        with Image.open(file) as image:
            turned = image.rotate(90, expand=True)
        turned.save(file)
    return folder


@pytest.mark.parametrize(
    ("stops", "base"),
    [
        ((1, 4), EIGHT_BIT),
        ((2,), {**EIGHT_BIT, "mixed_precision": "bf16", "ema_decay": 0.9}),
        ((4,), {"optimizer": "adafactor", "train_text_encoder": True, "text_encoder_learning_rate": 5e-4}),
        ((6,), {"optimizer": "prodigy", "learning_rate": 1.0, "ema_decay": 0.9}),
        ((3,), {"optimizer": "lion"}),
    ],
    ids=["adamw8bit", "bf16-ema", "adafactor-text", "prodigy-ema-buckets", "lion"],
)
def test_stopped_equals_never_stopped(
    world: Path, lay: Lay, tmp_path: Path, stops: tuple[int, ...], base: dict[str, Any]
) -> None:
    spec = spec_of(world, **base)
    if base.get("optimizer") == "prodigy":
        shapes = several_shapes(tmp_path / "images")
        buckets = {"buckets": True, "bucket_step": 8, "bucket_min": 16, "bucket_max": 64}
        spec = tiny_spec(world / "base", shapes, base=base, dataset=buckets)
    straight = lay("straight", spec)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE

    parts, newest_of = [], None
    for number, step in enumerate(stops):
        parts.append(lay(f"part {number}", spec, resume=newest_of))
        assert run_attempt(parts[-1], StopAtStep(parts[-1], step)) == EXIT_PREEMPTED
        newest_of = newest(parts[-1])
        assert newest_of.name == f"step-{step:09}"
    parts.append(lay("end", spec, resume=newest_of))
    assert run_attempt(parts[-1], Stop()) == EXIT_COMPLETE

    assert contents(newest(parts[-1])) == contents(newest(straight))
    seen = [event for run_dir in parts for event in events(run_dir, "step")]
    assert without_times(seen) == without_times(events(straight, "step"))


@pytest.mark.parametrize(("left_s", "saved"), [(0.0, 2), (1e9, 3)])
def test_a_stop_within_a_step_saves_the_step_before_if_there_is_no_time_for_the_rest(
    world: Path,
    lay: Lay,
    monkeypatch: pytest.MonkeyPatch,
    left_s: float,
    saved: int,
) -> None:
    spec = spec_of(world, gradient_accumulation_steps=4, max_train_steps=4)
    calm, run_dir, stop = lay("calm", spec), lay("run", spec), Stop()
    assert run_attempt(calm, StopAtStep(calm, saved)) == EXIT_PREEMPTED
    passes = iter(range(1, 100))
    ordinary = Stepper._loss

    def loss(stepper: Stepper, batch: Batch) -> Tensor:
        if next(passes) == 4 * 2 + 2:  # the second of the third step
            run_dir.order_stop(time.monotonic() + left_s)
            stop._on_signal(15, None)
        return ordinary(stepper, batch)

    monkeypatch.setattr(Stepper, "_loss", loss)
    assert run_attempt(run_dir, stop) == EXIT_PREEMPTED

    assert newest(run_dir).name == f"step-{saved:09}"
    assert contents(newest(run_dir)) == contents(newest(calm))


def without_times(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "step_s"} for event in seen]


def test_eight_bit_state_is_really_used(world: Path, lay: Lay) -> None:
    from safetensors import safe_open

    run_dir = lay("run", spec_of(world, max_train_steps=2, **EIGHT_BIT))
    run_attempt(run_dir, StopAtStep(run_dir, 1))

    with safe_open(newest(run_dir) / "optimizer.safetensors", framework="pt") as file:
        pieces = {(name.rpartition("#")[2], file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert {("state1", "U8"), ("state1", "F32"), ("absmax1", "F32"), ("qmap2", "F32")} <= pieces


def test_checkpoint_policy_and_an_interval_do_not_change_the_result(world: Path, lay: Lay) -> None:
    spec = spec_of(world, max_train_steps=4)
    rare, often = lay("rare", spec), lay("often", spec, every_steps=1)
    for run_dir in (rare, often):
        assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE

    assert contents(newest(rare)) == contents(newest(often))
    saved = [event["step"] for event in events(often, "checkpoint")]
    assert saved[0] == 1
    assert saved[-1] == 4


def test_a_checkpoint_of_the_last_step_leads_straight_to_the_final_part(world: Path, lay: Lay) -> None:
    spec = spec_of(world, max_train_steps=3)
    straight = lay("straight", spec)
    run_attempt(straight, Stop())
    stopped = lay("stopped", spec)
    assert run_attempt(stopped, StopAtStep(stopped, 3)) == EXIT_PREEMPTED
    again = lay("again", spec, resume=newest(stopped))
    assert run_attempt(again, Stop()) == EXIT_COMPLETE

    assert events(again, "step") == []
    assert contents(newest(again)) == contents(newest(straight))


def test_a_flipped_bit_in_the_checkpoint_is_code_65(world: Path, lay: Lay) -> None:
    spec = spec_of(world, max_train_steps=2)
    run_dir = lay("run", spec)
    run_attempt(run_dir, Stop())
    adapter = newest(run_dir) / "adapter.safetensors"
    body = bytearray(adapter.read_bytes())
    body[-1] ^= 1
    adapter.write_bytes(body)

    again = lay("again", spec, resume=newest(run_dir))

    assert serve(again, Stop()) == EXIT_BAD_CHECKPOINT
    assert "adapter.safetensors: sha256 is" in events(again, "error")[0]["message"]


def test_a_process_that_may_open_no_more_files_says_nothing_about_the_checkpoint(
    world: Path, lay: Lay
) -> None:
    run_dir = lay("run", spec_of(world, max_train_steps=1, lr_warmup_steps=0))
    run_attempt(run_dir, Stop())
    checkpoint = newest(run_dir)

    for read in (read_progress, read_adapter):
        with no_files_to_open(), pytest.raises(OSError, match="Too many open files"):
            read(checkpoint)


def test_a_checkpoint_of_another_rank_is_refused(world: Path, lay: Lay) -> None:
    run_dir = lay("run", spec_of(world, max_train_steps=1, lr_warmup_steps=0))
    run_attempt(run_dir, Stop())
    other = lay("other", spec_of(world, rank=2), resume=newest(run_dir))

    with pytest.raises(BadCheckpoint, match=r"has shape \[4, 8\], expected \[2, 8\]"):
        run_attempt(other, Stop())


def test_a_seed_decides_the_adapter(world: Path, lay: Lay) -> None:
    ends = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_dir = lay(name, spec_of(world, max_train_steps=2, seed=seed))
        run_attempt(run_dir, Stop())
        ends.append(contents(newest(run_dir))["adapter.safetensors"])

    assert ends[0] == ends[1] != ends[2]
