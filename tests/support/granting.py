"""A run with a grant desk before its log, and nodes that ask it, all in one process."""

from dataclasses import dataclass, field

from support.runs import RUN, claimed, incarnation

from storage import layout
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import Record
from storage.run_state import RunState
from storage.s3.presigned import Presigned
from storage.s3.store import S3Store
from storage.scoped.desk import GrantDesk
from storage.scoped.grants import (
    REPLY,
    Asked,
    Caller,
    Limits,
    Reply,
    Request,
)
from storage.scoped.http import PresignedHttp
from storage.scoped.store import ScopedLedger, ScopedStore


@dataclass
class LogRuns:
    """Implements ``storage.scoped.desk.Runs`` over the logs of a store."""

    store: ObjectStore
    limit: Limits = field(default_factory=Limits)
    logs: dict[str, RunLog] = field(default_factory=dict)

    def log(self, run_id: str) -> RunLog:
        return self.logs.setdefault(run_id, run_log(self.store, run_id))

    def state(self, run_id: str) -> RunState:
        return self.log(run_id).state

    def refreshed(self, run_id: str) -> RunState:
        return self.log(run_id).refresh()

    def append(self, run_id: str, record: Record) -> None:
        self.log(run_id).append(record)

    def limits(self, run_id: str) -> Limits:
        return self.limit


class Office:
    """The controller's side: a store with credentials, a log with one claim, a desk."""

    def __init__(self, store: ObjectStore, *, limit: Limits | None = None, expires_s: int = 900) -> None:
        assert isinstance(store, S3Store)
        self.store = store
        self.runs = LogRuns(store, limit or Limits())
        self.expires_s = expires_s
        self.now = 0.0
        self.runs.append(RUN, claimed(1))
        store.put(layout.run_spec(RUN), b"the spec")
        self.restart()

    def restart(self) -> None:
        """A new controller: nothing is known but the store."""
        self.runs = LogRuns(self.store, self.runs.limit)
        signer = self.store.signer()
        self.desk = GrantDesk(
            self.store, signer, self.runs, expires_s=self.expires_s, monotonic=lambda: self.now
        )

    def ask(self, asked: Asked, caller: Caller | None = None) -> Reply:
        body = Request(caller=caller or caller_of(1), asked=asked).model_dump_json().encode()
        return REPLY.validate_json(self.desk.answer(body))

    def node(self, caller: Caller | None = None, **options: int) -> tuple[ScopedStore, ScopedLedger]:
        who = caller or caller_of(1)
        # Through the attribute: after a restart nodes ask the new desk.
        store = ScopedStore(self.store.url, lambda body: self.desk.answer(body), who, **options)
        return store, ScopedLedger(lambda body: self.desk.answer(body), who, store)


def caller_of(attempt: int, *, slot: str = "n1/0", run_id: str = RUN) -> Caller:
    return Caller(run_id=run_id, attempt=attempt, incarnation=incarnation(attempt), slot=slot)


def data_key(step: int, name: str = "adapter.safetensors", attempt: int = 1) -> str:
    return layout.checkpoint_file(RUN, attempt, incarnation(attempt), step, name)


def send(signed: Presigned, body: bytes) -> int:
    """Send a presigned PUT as it is; return the status."""
    return PresignedHttp().put("test", signed, body)
