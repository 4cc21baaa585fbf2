"""A sweep: what ``grid.yaml`` amounts to once it is read, checked, expanded and pinned.

    read -> overrides laid over -> Grid (policies) + cells -> a RunSpec per cell -> digests -> run ids

A ``Sweep`` is a value. It is written to the bucket as the sweep's ``spec.json``, and with that alone
everything can be started again. A run's id is a hash of all that decides its result, so the same file gives
the same runs again, and a changed learning rate or image gives others. Every problem of a file is reported
at once.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from trainer.config import Frozen, RunSpec
from trainer.spec_inputs import pinned

from ..errors import InvalidFile, Problem, Unknown, closest, shown
from ..usual_store import DEFAULT_STORE
from .checks import grid_problems, idle_gpus
from .errors import explain
from .expansion import Cell, Expansion, comparable, expand
from .file import Document, read
from .overrides import overlaid
from .pins import absolute_url, identity, pins_of, run_id
from .run_specs import run_specs
from .schema import Checkpoint, Grid, Metric, Recovery, Resources, Storage


class PlannedRun(Frozen):
    """One run of a sweep."""

    run_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """``<sweep>-<index>-<first 8 hex digits of the hash of all that decides the result>``."""
    index: Annotated[int, Field(ge=0)]
    """Position in the sweep, from 0."""
    parameters: dict[str, Any]
    """What distinguishes this run from its siblings, as written: ``{"rank": 8, "learning_rate": 0.0001}``."""
    spec: RunSpec


class Sweep(Frozen):
    """Everything that was asked for, resolved: no defaults left to fill in, no relative paths."""

    version: int = 1
    name: str
    description: str = ""
    project: str = ""
    metric: Metric | None = None
    """None: nothing ranks the runs, because no image is held out and no command scores them."""
    resources: Resources = Resources()
    storage: Storage
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    pins: dict[str, str] = Field(default_factory=dict)
    """sha256 of the content of each local dataset, base model and evaluation file, by absolute path."""
    left_out: Annotated[int, Field(ge=0)] = 0
    """How many runs ``run_cap`` cut off."""
    runs: tuple[PlannedRun, ...]

    def to_json(self) -> bytes:
        """The sweep as its ``spec.json``. Equal sweeps give equal bytes."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Read a ``spec.json``.

        Raises:
            ValueError: The bytes are not a sweep that this version can read.
        """
        return cls.model_validate_json(body)

    def run(self, run_id: str) -> PlannedRun:
        """Return a run by its id.

        Raises:
            Unknown: With the closest name.
        """
        for run in self.runs:
            if run.run_id == run_id:
                return run
        ids = [run.run_id for run in self.runs]
        raise Unknown(f"no run {shown(run_id)} in sweep {self.name}{closest(run_id, ids)}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A sweep file that is right in itself; nothing that it names was looked at yet."""

    name: str
    grid: Grid
    storage: Storage
    cells: tuple[tuple[Cell, RunSpec], ...]
    left_out: int
    folder: Path


def load(path: Path, *, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, and hash the datasets, local models and scripts that it names.

    Datasets on the hub or in a bucket are fetched for it.

    Args:
        overrides: ``KEY=VALUE`` texts laid over the file: ``base.max_train_steps=10``, or ``rank=4`` for a
            key of ``base``.

    Raises:
        InvalidFile: With every problem. A dataset or model that is missing is none of them: ``preflight``
            says so, and until then the runs that need it are without a digest.
    """
    from .remote import remote_pins, with_remote  # imports Pillow, which checking a file needs not

    draft = validate(path, overrides=overrides)
    drafts = [spec for _, spec in draft.cells]
    pins, remote = pins_of(drafts, draft.folder), remote_pins(drafts)
    grid = draft.grid
    runs = []
    for index, (cell, draft_spec) in enumerate(draft.cells):
        spec = with_remote(pinned(draft_spec, pins), remote)
        name = run_id(draft.name, index, spec, pins)
        runs.append(PlannedRun(run_id=name, index=index, parameters=cell.parameters, spec=spec))
    return Sweep(
        name=draft.name,
        description=grid.description,
        project=grid.project,
        metric=grid.metric or _default_metric(runs),
        resources=grid.resources,
        storage=draft.storage,
        checkpoint=grid.checkpoint,
        recovery=grid.recovery,
        pins=pins,
        left_out=draft.left_out,
        runs=tuple(runs),
    )


def validate(path: Path, *, overrides: Sequence[str] = ()) -> Draft:
    """Read and check a sweep file, without touching anything that it names.

    Raises:
        InvalidFile: With every problem, in the order of the file.
    """
    document = overlaid(read(path), overrides)
    grid, broken, problems = _grid(document)
    document = replace(
        document, data={key: value for key, value in document.data.items() if key not in broken}
    )
    problems += grid_problems(document, grid)
    can_expand = grid.method == "grid" and "parameters" not in broken
    expansion = expand(document, grid) if can_expand else Expansion()
    folder = path.absolute().parent
    specs, wrong = run_specs(document, expansion.cells, folder, broken)
    problems += [*expansion.problems, *wrong, *idle_gpus(document, grid, specs)]
    if problems:
        raise InvalidFile(in_file_order(problems))
    storage = grid.storage or Storage(url=os.environ.get("ORCHESTRATE_STORE") or DEFAULT_STORE)
    return Draft(
        name=grid.name or default_name(path),
        grid=grid,
        storage=storage.model_copy(update={"url": absolute_url(storage.url)}),
        cells=tuple(zip(expansion.cells, specs, strict=True)),
        left_out=expansion.left_out,
        folder=folder,
    )


def default_name(path: Path) -> str:
    """Return the sweep name that a file's own name suggests."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:40].rstrip("-") or "sweep"


def in_file_order(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems from the top of the file to its end, each once."""

    def position(problem: Problem) -> tuple[bool, tuple[int, ...]]:
        numbers = re.search(r":(\d+):(\d+)$", problem.where or "")
        return numbers is None, tuple(map(int, numbers.groups())) if numbers else ()

    return sorted(dict.fromkeys(problems), key=position)


def differences(old: Sweep, new: Sweep) -> list[str]:
    """Say in what a sweep differs from the one of that name before, one line each; empty if in nothing.

    Where things lie on this machine does not count, their content does.
    """
    apart = {"runs", "pins", "storage", "version"}
    lines = _changes(old.model_dump(mode="json", exclude=apart), new.model_dump(mode="json", exclude=apart))
    before, after = ({comparable(run.parameters): run for run in sweep.runs} for sweep in (old, new))
    lines += [f"{_called(run)} is gone" for key, run in before.items() if key not in after]
    lines += [f"{_called(run)} is new" for key, run in after.items() if key not in before]
    kept = [(before[key], after[key]) for key in before if key in after]
    in_runs: dict[str, int] = {}
    for was, now in kept:
        for line in _spec_changes(was, old, now, new):
            in_runs[line] = in_runs.get(line, 0) + 1
    lines += [line if count == len(kept) else f"{line} (in {count} runs)" for line, count in in_runs.items()]
    if not lines and [run.run_id for run in old.runs] != [run.run_id for run in new.runs]:
        lines.append("the order of the runs has changed")
    return lines


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inner = ((key, f"{path}.{key}" if path else key) for key in keys)
        return [line for key, name in inner for line in _changes(old.get(key), new.get(key), name)]
    return [] if comparable(old) == comparable(new) else [f"{path}: {shown(old)} before, {shown(new)} now"]


def _spec_changes(was: PlannedRun, old: Sweep, now: PlannedRun, new: Sweep) -> list[str]:
    """The differences of one run, with inputs compared by content: by what its id is made of."""
    before, after = (identity(run.spec, sweep.pins, defaults=True) for run, sweep in ((was, old), (now, new)))
    if was.spec.command or now.spec.command:
        return _changes(before, after)
    lines = []
    if before["dataset"].pop("digest") != after["dataset"].pop("digest"):
        lines.append(f"the content of dataset {now.spec.dataset.path} has changed")
    if before["base"]["model"] != after["base"]["model"] and was.spec.base.model == now.spec.base.model:
        lines.append(f"the content of base model {now.spec.base.model} has changed")
        del before["base"]["model"], after["base"]["model"]
    return lines + _changes(before, after)


def _called(run: PlannedRun) -> str:
    return f"the run with {', '.join(f'{name}={shown(value)}' for name, value in run.parameters.items())}"


def _default_metric(runs: Sequence[PlannedRun]) -> Metric | None:
    held_out = all(run.spec.command is None and run.spec.dataset.val_fraction > 0 for run in runs)
    return Metric() if held_out else None


def _grid(document: Document) -> tuple[Grid, frozenset[str], list[Problem]]:
    """Return what of the file's top level can be used, the keys that cannot, and what is wrong with them."""
    try:
        return Grid.model_validate_json(json.dumps(document.data), strict=True), frozenset(), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
        broken = frozenset(str(details["loc"][0]) for details in errors)
        usable = {key: value for key, value in document.data.items() if key not in broken}
        grid = Grid.model_validate_json(json.dumps(usable), strict=True)
        return grid, broken, explain(errors, Grid, document, lambda loc: loc)
