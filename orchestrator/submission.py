"""A sweep in the store: what ``sweep`` writes, and everything that ``resume`` needs.

The runs' specs are written first and the sweep's last, each create-only: a sweep exists exactly when its own
spec does, and submitting the same file again changes nothing.
"""

from storage import layout
from storage.errors import InvalidName, NotFound
from storage.object_store import ObjectStore
from trainer.config import RunSpec

from .errors import Ambiguous, InvalidFile, OrchestrateError, Problem, Unknown, shown, suggest
from .sweep import Sweep, differences


def submit(sweep: Sweep, store: ObjectStore) -> bool:
    """Write the sweep to the store. True if it is new, False if the very same was submitted before.

    Raises:
        InvalidFile: Another sweep of this name is in the store; the problems are the differences.
    """
    known = _read(sweep.name, store)
    if known is None:
        for run in sweep.runs:
            store.create(layout.run_spec(run.run_id), run.spec.model_dump_json().encode())
        if store.create(layout.sweep_spec(sweep.name), sweep.to_json()):
            return True
        known = load_submitted(store, sweep.name)
    changed = differences(known, sweep)
    if changed:
        hint = "give the changed file another name, with 'name:' or --name"
        raise InvalidFile(
            [
                Problem(code="E2190", message=f"sweep {sweep.name} was submitted before: {c}", hint=hint)
                for c in changed
            ]
        )
    return False


def load_submitted(store: ObjectStore, name: str) -> Sweep:
    """Read a submitted sweep.

    Raises:
        Unknown: There is none of that name.
    """
    sweep = _read(name, store)
    if sweep is None:
        raise _unknown("sweep", name, sweep_names(store), store.url)
    return sweep


def sweep_names(store: ObjectStore) -> list[str]:
    """Every sweep in the store."""
    names = []
    for info in store.list("sweeps/"):
        parsed = layout.parse_spec(info.key)
        if parsed:
            names.append(parsed[1])
    return names


def read_spec(store: ObjectStore, run_id: str) -> RunSpec:
    """Read a run's spec."""
    return RunSpec.model_validate_json(store.get(layout.run_spec(run_id)))


def find_run(store: ObjectStore, name: str) -> tuple[Sweep, str]:
    """Return the sweep and the id of the run that ``name`` means: ``sweep/index``, or how its id begins.

    Raises:
        Unknown: There is no such run.
        Ambiguous: There are several.
    """
    known = sweep_names(store)
    sweep_name, slash, index = name.partition("/")
    if slash:
        sweep = load_submitted(store, sweep_name)
        for run in sweep.runs:
            if str(run.index) == index:
                return sweep, run.run_id
        raise _unknown("run", name, [f"{sweep_name}/{run.index}" for run in sweep.runs], store.url)
    sweeps = [load_submitted(store, s) for s in known if name.startswith(f"{s}-") or s.startswith(name)]
    runs = [(sweep, run.run_id) for sweep in sweeps for run in sweep.runs]
    exact = [(sweep, run_id) for sweep, run_id in runs if run_id == name]
    found = exact or [(sweep, run_id) for sweep, run_id in runs if run_id.startswith(name)]
    if len(found) > 1:
        raise Ambiguous("run", name, [run_id for _, run_id in found])
    if not found:
        raise _unknown("run", name, [run_id for _, run_id in runs] or known, store.url)
    return found[0]


def _read(name: str, store: ObjectStore) -> Sweep | None:
    try:
        body = store.get(layout.sweep_spec(name))
    except (NotFound, InvalidName):
        return None
    try:
        return Sweep.from_json(body)
    except ValueError as error:
        raise OrchestrateError(
            f"{layout.sweep_spec(name)} in {store.url} is no sweep that this version can read: {error}"
        ) from error


def _unknown(kind: str, name: str, known: list[str], where: str) -> Unknown:
    """Return the error, with what could have been meant."""
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    there_are = f"there are: {', '.join(known[:8])}{more}" if known else "there is none"
    return Unknown(f"no {kind} {shown(name)} in {where} — {suggest(name, known) or there_are}")
