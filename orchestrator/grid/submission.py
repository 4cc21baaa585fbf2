"""A sweep in the store: what ``sweep`` writes, and everything that ``resume`` needs.

The runs' inputs and specs are written first and the sweep's spec last, each create-only: a sweep exists
exactly when its own spec does, and submitting the same file again changes nothing. That a sweep needs an
input is recorded before the sweep exists, and looked at again after: a garbage collector that took the one
for a submission that had died is found out, and the input is uploaded anew.
"""

from storage import layout
from storage.errors import InvalidName, NotFound
from storage.object_store import ObjectStore
from trainer.config import RunSpec

from ..errors import Ambiguous, InvalidFile, OrchestrateError, Problem, Unknown, shown, suggest
from .inputs import Sent, are_uploaded, store_inputs
from .sweep import Sweep, differences


def submit(sweep: Sweep, store: ObjectStore, on_sent: Sent = lambda size_bytes: None) -> bool:
    """Write the sweep to the store. True if it is new, False if the very same was submitted before.

    Args:
        on_sent: Told the size of each file of its inputs that is in the store from now on.

    Raises:
        InvalidFile: Another sweep of this name is in the store; the problems are the differences.
        PreflightFailed: An input changes meanwhile.
    """
    known = not is_new(sweep, store)
    upload = are_uploaded(sweep.storage, store)
    if upload:
        store_inputs(sweep, store, submitted=known, on_sent=on_sent)
    if known:
        return False
    for run in sweep.runs:
        store.create(layout.run_spec(run.run_id), run.spec.model_dump_json().encode())
    created = store.create(layout.sweep_spec(sweep.name), sweep.to_json())
    if not created:
        _refuse_another(load_submitted(store, sweep.name), sweep)
    if upload:
        store_inputs(sweep, store, submitted=True, on_sent=on_sent)
    return created


def is_new(sweep: Sweep, store: ObjectStore) -> bool:
    """Whether no sweep of this name is in the store; False if the very same is.

    Raises:
        InvalidFile: Another sweep of this name is in the store; the problems are the differences.
    """
    known = _read(sweep.name, store)
    _refuse_another(known, sweep)
    return known is None


def _refuse_another(known: Sweep | None, sweep: Sweep) -> None:
    changed = differences(known, sweep) if known else []
    if changed:
        hint = "give the changed file another name, with 'name:' or --name"
        raise InvalidFile(
            [
                Problem(code="E2190", message=f"sweep {sweep.name} was submitted before: {c}", hint=hint)
                for c in changed
            ]
        )


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


def find_run(store: ObjectStore, name: str, kind: str = "run") -> tuple[Sweep, str]:
    """Return the sweep and the id of the run that ``name`` means: ``sweep/index``, or how its id begins.

    Args:
        kind: What could have been named, for the message.

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
        raise _unknown(kind, name, [run_id for _, run_id in runs] or known, store.url)
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
    there_are = f"there are: {', '.join(known[:8])}{more}" if known else "the store has no sweeps"
    return Unknown(f"no {kind} {shown(name)} in {where} — {suggest(name, known) or there_are}")
