"""Between the controller and the grant desk: whose runs it grants for, and whether a store can be used so."""

from storage.errors import Fenced
from storage.object_store import ObjectStore
from storage.records import Record
from storage.run_state import RunState
from storage.s3.presigned import Presigned
from storage.scoped.desk import GrantDesk, unenforced
from storage.scoped.grants import Limits
from storage.scoped.http import PresignedHttp
from trainer.spec_inputs import inputs_of

from ..control.controller import Controller
from ..errors import OrchestrateError
from ..grid.sweep import Sweep

NEEDED = "storage.credentials: scoped needs a bucket whose server keeps create-only and signed headers"


def _send(signed: Presigned, body: bytes) -> int:
    return PresignedHttp().put("probe", signed, body)


class Unenforced(OrchestrateError):
    """Nodes without credentials would be nodes without limits in this store."""


class SweepRuns:
    """Implements ``storage.scoped.desk.Runs`` over a controller."""

    def __init__(self, sweep: Sweep, controller: Controller) -> None:
        self._controller = controller
        self._limits = {
            run.run_id: Limits(
                max_checkpoint_bytes=sweep.storage.max_checkpoint_bytes,
                last_step=run.spec.max_steps,
                inputs=frozenset(named.digest for named in inputs_of(run.spec) if named.digest),
            )
            for run in sweep.runs
        }

    def state(self, run_id: str) -> RunState:
        return self._controller.state(run_id)

    def refreshed(self, run_id: str) -> RunState:
        return self._controller.state(run_id, refresh=True)

    def append(self, run_id: str, record: Record) -> None:
        self._controller.append(run_id, record)

    def limits(self, run_id: str) -> Limits:
        if run_id not in self._limits:
            raise Fenced(f"{run_id} is not a run of this sweep")
        return self._limits[run_id]


def check_store(store: ObjectStore) -> None:
    """Check, by trying, that the store's server enforces what is signed.

    Raises:
        Unenforced: It does not.
        OrchestrateError: It is not an S3 server at all.
        AccessDenied, Unavailable: It could not be tried.
    """
    from storage.s3.store import S3Store

    if not isinstance(store, S3Store):
        raise OrchestrateError(f"{NEEDED}; {store.url} is no bucket — use s3://… or credentials: env")
    if missing := unenforced(store, store.signer(), _send):
        raise Unenforced(f"{NEEDED}; {store.url}: {missing} — use another server or credentials: env")


def desk_for(sweep: Sweep, controller: Controller, store: ObjectStore) -> GrantDesk:
    """The desk of a sweep, on a store that ``check_store`` has passed."""
    from storage.s3.store import S3Store

    assert isinstance(store, S3Store)
    return GrantDesk(store, store.signer(), SweepRuns(sweep, controller))
