"""Much at once: what was written apart works together, goes on after a stop, and is exported half way."""

from pathlib import Path
from typing import Any

import pytest
from support.adapters import adapted_checkpoint
from support.tiny_world import tiny_spec
from support.training import Lay, StopAtStep, contents, events, newest

from trainer.attempt import run_attempt
from trainer.config import RunSpec
from trainer.export import trained_adapter, verify_export
from trainer.export.files import write_weights
from trainer.rundir import ADAPTER, EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.stop import Stop

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ADAPTED = {"rank": 2, "alpha": 1.0, "use_dora": True, "train_text_encoder": True}


def spec_of(world: Path, base: dict[str, Any], **blocks: Any) -> RunSpec:
    dataset = {"shuffle_caption": True, "masks": "alpha", "trigger": "rufus", **blocks.pop("dataset", {})}
    keys = {"max_train_steps": 3, "ema_decay": 0.9, "loss_weighting": "min_snr", **ADAPTED, **base}
    return tiny_spec(world / "base", world / "images", base=keys, dataset=dataset, **blocks)


def test_a_run_with_much_of_everything_is_resumed_and_exported_half_way(
    world: Path, lay: Lay, tmp_path: Path
) -> None:
    """An adapter to go on from, another one merged, averages, trained texts that vary, masks, random crops
    and flips, class images, passes of one image, validation and samples on the way."""
    start = adapted_checkpoint(spec_of(world, {}), tmp_path / "start") / ADAPTER
    begun = {"initial_adapter": str(start), "merged_adapters": [{"path": str(start), "weight": 0.5}]}
    spec = spec_of(
        world,
        begun,
        prior={"prompt": "a [trigger]", "images": 2, "steps": 1},
        validation={"every": 1, "timesteps": 1},
        samples={"prompts": ["a [trigger]"], "every": 2, "steps": 1},
    )
    straight = lay("straight", spec, micro_batch=1)
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    first = lay("first", spec, micro_batch=1)
    assert run_attempt(first, StopAtStep(first, 2)) == EXIT_PREEMPTED
    halfway = newest(first)
    second = lay("second", spec, resume=halfway, micro_batch=1)
    assert run_attempt(second, Stop()) == EXIT_COMPLETE

    assert contents(newest(second)) == contents(newest(straight))
    seen = [[e["val/loss"] for e in events(run_dir, "validation")] for run_dir in (first, second, straight)]
    assert [*seen[0], *seen[1]] == seen[2]
    trained = trained_adapter(halfway, spec)
    assert verify_export(write_weights(trained, tmp_path / "out", "kohya"), trained)["modules"] > 0
