"""The blocks of a sweep file, except those that a run's spec consists of (``trainer.config`` has these).

Each is a frozen value with the file's own words, and goes into the sweep's ``spec.json`` as it is. None of
them changes the bytes of an adapter: where runs go, how often they save, when they are given up.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trainer.config import Base, Command, Dataset, Evaluate, Frozen, Prior, Samples, Validation
from trainer.interval import MIN_S
from trainer.rundir import CheckpointPolicy

from .options import aliases

SWEEP_NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"
"""Short enough that ``<sweep>-<index>-<hash>`` is a valid name everywhere: at most 63 characters."""

ALIASES = aliases()
"""kohya's and diffusers' names, and the block and key that each stands for."""

BLOCKS: dict[str, type[Frozen]] = {
    "base": Base,
    "dataset": Dataset,
    "prior": Prior,
    "validation": Validation,
    "samples": Samples,
    "evaluate": Evaluate,
    "command": Command,
}
"""What a run's spec is made of."""

NOT_YET = frozenset(
    {"early_terminate", "budget", "notify", "track", "export", "program", "controller", "entity"}
)
"""Words of our design or of W&B sweeps that this version does not act on."""

AUTO = "auto"

METHODS = ("grid", "random", "bayes")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Metric(Frozen):
    """By what runs are compared."""

    name: Annotated[str, Field(min_length=1)] = "val/loss"
    """``val/loss``, or a number that the ``evaluate`` command reports."""
    goal: Literal["minimize", "maximize"] = "minimize"


class Notices(Frozen):
    """How a node learns of its own end before it comes. ``notices: aws`` is short for ``{service: aws}``."""

    service: Literal["auto", "none", "aws", "gcp", "azure"] = "auto"
    """``auto``: the cloud that the node finds itself in, if any."""
    file: str | None = None
    """A path on the node: while it is there, the node is about to end. It may say in how many seconds."""
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A program on the node, run every two seconds: exit code 0 is a notice, what it prints may say more."""
    url: str | None = None
    """The same by a request: status 200 is a notice, 204 and 404 are none."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"service": given} if isinstance(given, str) else given

    @field_validator("command", mode="before")
    @classmethod
    def _listed(cls, command: Any) -> Any:
        return tuple(command) if isinstance(command, list) else command

    @field_validator("file")
    @classmethod
    def _absolute(cls, file: str | None) -> str | None:
        if file is not None and not file.startswith("/"):
            raise ValueError(f"must be an absolute path on the node, got {file!r}")
        return file

    @field_validator("url")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, got {url!r}")
        if url is not None and "@" in urlsplit(url).netloc:
            raise ValueError("must not contain a user or a password: the file is kept, and shown, as it is")
        return url

    @model_validator(mode="after")
    def _one(self) -> Self:
        named = [key for key in ("file", "command", "url") if getattr(self, key) is not None]
        if len(named) > 1 or (named and self.service != "auto"):
            raise ValueError("resources.notices must name one of service, file, command and url")
        return self


class Resources(Frozen):
    """What one run needs."""

    gpus: Annotated[float, Field(ge=0)] = 1.0
    """GPUs of one run, all of one node. 0 trains on the CPU; a fraction lets runs share one."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """The most images of one forward pass on these GPUs; by default ``base.train_batch_size``."""
    cpus: Annotated[float, Field(ge=1)] = 1.0
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Runs at the same time; by default as many as fit."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """USD for an hour of what one run occupies."""
    notices: Notices = Notices()
    """Who tells a node that it is about to be taken away."""

    @field_validator("gpus")
    @classmethod
    def _shared_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"must be a whole number, or below 1 to share a GPU, got {gpus:g}")
        return gpus

    @property
    def processes(self) -> int:
        """Processes that train one run together: one to a GPU."""
        return max(1, int(self.gpus))


class Storage(Frozen):
    """Where checkpoints, logs and results go."""

    url: str
    """``s3://bucket/prefix?endpoint=https://…`` or ``file:///folder``. Credentials are never part of it."""
    credentials: Literal["env", "scoped"] = "env"
    """``env``: nodes find the bucket's keys in their own environment. ``scoped``: nodes have none, and get
    signed requests for their attempt's own files from the controller, which verifies what they commit."""
    max_checkpoint_bytes: Annotated[int, Field(ge=1)] = 20_000_000_000
    """What one checkpoint of a scoped node may have in the store."""
    upload_inputs: Literal["auto", "always", "never"] = "auto"
    """Whether local datasets and base models are copied into the store, once, for nodes without them.
    ``auto``: into a bucket, not into a folder."""


class Checkpoint(Frozen):
    """When a run saves itself, and what stays in the store."""

    every: Annotated[int, Field(ge=1)] | str = "120s"
    """Steps (``200``) or time (``120s``, ``5m``, ``1h``): the most work that one preemption can cost.
    ``auto``: what costs least, by the measured stall and upload and the lifetimes of the sweep's nodes."""
    max_every: str = "10m"
    """The longest time that ``auto`` may choose, unless an upload takes longer."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints of a run stay."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Also keep steps divisible by this; 0: none."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Also keep this many with the best metric."""
    grace_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between retiring a checkpoint and deleting its data: who is reading it can finish."""

    @field_validator("every")
    @classmethod
    def _readable(cls, every: int | str) -> int | str:
        if isinstance(every, str) and every != AUTO and not seconds(every):
            raise ValueError(f"must be steps (200), a time ('120s', '5m', '1h') or 'auto', got {every!r}")
        return every

    @field_validator("max_every")
    @classmethod
    def _a_time(cls, max_every: str) -> str:
        if not seconds(max_every):
            raise ValueError(f"must be a time ('120s', '5m', '1h'), got {max_every!r}")
        return max_every

    @property
    def policy(self) -> CheckpointPolicy:
        """The same, as the training process reads it."""
        if self.every == AUTO:
            return CheckpointPolicy(every_s=MIN_S, auto_max_s=seconds(self.max_every))
        if isinstance(self.every, str):
            return CheckpointPolicy(every_s=seconds(self.every))
        return CheckpointPolicy(every_steps=self.every, every_s=None)


class Recovery(Frozen):
    """How patient the controller is. Preemptions are free: only attempts without progress count."""

    max_failures: Annotated[int, Field(ge=1)] = 3
    """Consecutive attempts that failed without a new checkpoint, after which the run has failed."""
    backoff_s: Annotated[float, Field(ge=0)] = 5.0
    """Wait after the first such attempt; doubled by each further one."""
    max_backoff_s: Annotated[float, Field(ge=0)] = 300.0
    silence_s: Annotated[float, Field(gt=0)] = 90.0
    """Seconds without a sign of life after which an attempt is replaced."""
    stop_grace_s: Annotated[float, Field(gt=0)] = 25.0
    """Seconds from SIGTERM to SIGKILL. The last checkpoint must fit."""
    stall_timeout: str = "10m"
    """A trainer that shows no sign of progress for so long hangs: it tells its stacks and is killed."""

    @field_validator("stall_timeout")
    @classmethod
    def _a_time(cls, stall_timeout: str) -> str:
        if not seconds(stall_timeout):
            raise ValueError(f"must be a time ('90s', '10m', '1h'), got {stall_timeout!r}")
        return stall_timeout

    @property
    def stall_timeout_s(self) -> float | None:
        return seconds(self.stall_timeout)


class Grid(Frozen):
    """A sweep file, as written. What its blocks of training keys hold is checked cell by cell."""

    version: int = 1
    name: Annotated[str, Field(pattern=SWEEP_NAME)] | None = None
    description: str = ""
    project: str = ""
    method: str = "grid"
    metric: Metric | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    include: list[dict[str, Any]] = Field(default_factory=list)
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    run_cap: Annotated[int, Field(ge=1)] | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    dataset: dict[str, Any] = Field(default_factory=dict)
    prior: dict[str, Any] | None = None
    validation: dict[str, Any] = Field(default_factory=dict)
    samples: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    command: dict[str, Any] | None = None
    resources: Resources = Resources()
    storage: Storage | None = None
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()


def seconds(text: str) -> float | None:
    """Return the seconds of a time such as ``120s``, ``5m`` or ``1.5h``; None if it is not one above 0."""
    found = _DURATION.fullmatch(text.strip())
    return float(found[1]) * _SECONDS[found[2]] or None if found else None


@cache
def parameter_names() -> Mapping[str, tuple[str, str]]:
    """Return each name that a parameter may have, and the block and key that it stands for.

    Keys of ``base`` are written without it; those of other blocks as ``dataset.caption_dropout``.
    """
    names = {f"{block}.{key}": (block, key) for block, model in BLOCKS.items() for key in model.model_fields}
    names |= {key: ("base", key) for key in Base.model_fields}
    return names | ALIASES


def canonical_name(name: str) -> str | None:
    """Return the one name of a parameter: ``rank`` for ``network_dim`` and ``base.rank``. None if unknown."""
    known = parameter_names().get(name)
    if known is None:
        return None
    block, key = known
    return key if block == "base" else f"{block}.{key}"
