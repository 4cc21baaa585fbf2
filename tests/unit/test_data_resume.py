"""A run on buckets, repeats, masks and varied captions, stopped again and again: each sample comes once."""

from pathlib import Path

import pytest
from PIL import Image
from support.tiny_world import tiny_spec
from support.training import Lay, StopAtStep, contents, events, newest

from trainer.attempt import prepare, run_attempt
from trainer.config import RunSpec
from trainer.errors import BadInput
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.stop import Stop
from trainer.texts import LiveTexts


def write(folder: Path) -> None:
    for index, (name, size) in enumerate(
        [("2_sks dog/0", (40, 32)), ("2_sks dog/1", (32, 48)), ("cats/2", (48, 32)), ("cats/3", (32, 32))]
    ):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.radial_gradient("L").resize(size).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(path)
        if "cats" in name:
            path.with_suffix(".txt").write_text(f"cat, number {index}, on grass")


def spec_of(world: Path, images: Path, **base: object) -> RunSpec:
    dataset = {
        "concepts": {"cats": {"loss_weight": 0.5}},
        "buckets": True,
        "bucket_min": 16,
        "bucket_step": 8,
        "masks": "alpha",
        "shuffle_caption": True,
        "tag_dropout": 0.2,
        "val_fraction": 0.25,
    }
    base = {"max_train_steps": 5, "train_batch_size": 2, "gradient_accumulation_steps": 1, **base}
    return tiny_spec(world / "base", images, base=base, dataset=dataset)


def test_stopped_again_and_again_each_sample_comes_exactly_once(
    world: Path, lay: Lay, tmp_path: Path
) -> None:
    write(tmp_path / "images")
    spec = spec_of(world, tmp_path / "images")
    straight = lay("straight", spec)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE

    resume, attempts = None, []
    for name, stop_at in (("first", 1), ("second", 3), ("last", None)):
        run_dir = lay(name, spec, resume=resume)
        stop = Stop() if stop_at is None else StopAtStep(run_dir, stop_at)
        assert run_attempt(run_dir, stop) == (EXIT_PREEMPTED if stop_at else EXIT_COMPLETE)
        attempts.append(run_dir)
        resume = newest(run_dir)

    assert contents(newest(attempts[-1])) == contents(newest(straight))
    seen = [
        event["first_sample"] + k
        for run_dir in attempts
        for event in events(run_dir, "step")
        for k in range(event["samples"])
    ]
    assert seen == list(range(5 * 2))


def test_each_slot_of_an_epoch_is_trained_on_once(world: Path, lay: Lay, tmp_path: Path) -> None:
    write(tmp_path / "images")
    parts = prepare(lay("run", spec_of(world, tmp_path / "images")), Stop())

    assert isinstance(parts.texts, LiveTexts)
    batches = [batch for step in range(10) for batch in parts.training.batches(step, 2)]
    assert sorted(n for batch in batches for n in batch.samples) == list(range(20))
    weights = sorted(weight for batch in batches for weight in batch.weights_B.tolist())
    held_out = parts.validation[0].name
    cats = 2 - ("cats" in held_out)
    per_epoch = cats + 2 * (2 - ("dog" in held_out))
    assert weights.count(0.5) * per_epoch == pytest.approx(20 * cats, abs=per_epoch)
    assert all(batch.mask_B1HW is not None for batch in batches)
    assert len({batch.x0_BCHW.shape[2:] for batch in batches}) > 1
    assert {
        batch.sizes_B6[0, 4:].tolist() == [8 * s for s in batch.x0_BCHW.shape[2:]] for batch in batches
    } == {True}


def test_fewer_images_than_a_batch_are_refused(world: Path, lay: Lay, tmp_path: Path) -> None:
    write(tmp_path / "images")

    with pytest.raises(BadInput, match="a batch has 9 images, but an epoch has"):
        prepare(lay("run", spec_of(world, tmp_path / "images", train_batch_size=9)), Stop())
