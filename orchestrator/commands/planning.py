"""What the runs of a sweep will need of a GPU's memory: asked of the trainer, once for each kind of run.

torch stays in a process of its own, as for every command that needs it.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.config import RunSpec

from ..grid.sweep import Sweep
from .exporting import trainer_lines

_OF_NO_EFFECT = frozenset(
    {
        *("seed", "learning_rate", "text_encoder_learning_rate", "token_learning_rate"),
        *("lr_scheduler", "lr_warmup_steps"),
        *("lr_num_cycles", "lr_power", "max_train_steps", "weight_decay", "max_grad_norm", "alpha"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "digest", "loss_weighting", "lora_dropout"),
    }
)
"""Keys of ``base`` in which runs of one kind may differ. A key that is missing here costs a plan more."""


def planned_memory(sweep: Sweep, hollow_below: float | None = None) -> Iterator[str]:
    """Yield the lines of the plan.

    Args:
        hollow_below: Find instead with which cut training needs less than so many GB.

    Raises:
        OrchestrateError: The base model is not described where the file says.
    """
    resources = sweep.resources
    kinds: dict[str, list[tuple[str, RunSpec]]] = {}
    for run in sweep.runs:
        if run.spec.command is None:
            kinds.setdefault(kind_of(run.spec), []).append((run.run_id, run.spec))
    if not kinds:
        yield "runs of commands of their own: only they know what they need"
    for runs in kinds.values():
        name, spec = runs[0]
        yield name if len(runs) == 1 else f"{name} and {len(runs) - 1} more like it"
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "spec.json"
            file.write_text(spec.model_dump_json())
            options = ["--micro-batch", str(resources.micro_batch)] if resources.micro_batch else []
            if 0 < resources.gpus < 1:
                options += ["--runs-on-a-gpu", str(int(1 / resources.gpus))]
            if hollow_below is not None:
                options += ["--hollow-below", str(hollow_below)]
            yield from trainer_lines("plan", "--spec", str(file), *options)
    if resources.gpus == 0:
        yield "resources.gpus is 0: the runs train on CPUs, in their memory, with other kernels"


def kind_of(spec: RunSpec) -> str:
    """What of a spec decides how much memory it takes."""
    told = {"cache_text", "shuffle_caption", "tag_dropout", "masks"}
    return repr(
        (
            spec.base.model_dump(exclude=set(_OF_NO_EFFECT)),
            spec.dataset.model_dump(include=told),
            spec.samples and (len(spec.samples.seeds), spec.samples.cfg, bool(spec.samples.every)),
            spec.prior and (spec.prior.online, spec.prior.cfg),
        )
    )
