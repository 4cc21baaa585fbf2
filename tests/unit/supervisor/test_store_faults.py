"""A store or a disk that fails: what is waited for, what ends an attempt, and what is said of it."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import RUN, claimed, committed, ended, incarnation, lived
from support.supervised import LIGHT_SPEC, Failing, Supervise, claim
from support.sweeps import records, state
from support.waiting import wait_until

from storage import layout
from storage.errors import AccessDenied, Unavailable
from storage.log import Log, RunLog, run_log
from storage.memory import MemoryStore
from storage.records import RUN_ENTRY, EndReason, Record, Started
from storage.run_state import RunState
from trainer.patience import STORE_PATIENCE_S, one_line, patiently
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, EXIT_STORE_UNREACHABLE, Options, end_reason
from trainer.supervisor import Assignment, Progress, Supervisor


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("list", Unavailable("503 SlowDown")),
        ("download", Unavailable("connection reset")),
        ("list", AccessDenied("expired token")),
    ],
)
def test_a_store_that_stays_away_while_fetching_ends_the_attempt_with_an_error(
    call: str, error: Exception, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.patience.STORE_PATIENCE_S", 0.0)
    store = with_a_checkpoint(Failing(call, error))

    final = supervise(store, 2, light="steps").end()

    assert final == Progress(exit_code=EXIT_STORE_UNREACHABLE, error=f"{type(error).__name__}: {error}")
    assert end_reason(EXIT_STORE_UNREACHABLE) is EndReason.STORAGE_DOWN


def with_a_checkpoint(store: Failing) -> Failing:
    """A run with one real checkpoint, whose second attempt is claimed. From here on the store fails."""
    body = b"weights 3"
    commit = committed(3)
    whole = commit.model_copy(
        update={"files": (commit.files[0].model_copy(update={"size_bytes": len(body), "sha256": sha(body)}),)}
    )
    lived(store, RUN, claimed(1), whole, ended(1), claimed(2))
    store.put(layout.committed_file(RUN, whole, "adapter.safetensors"), body)
    store.armed = True
    return store


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_store_that_is_away_for_a_while_delays_the_attempt(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.patience.FIRST_PAUSE_S", 0.01)
    store = with_a_checkpoint(Failing("download", Unavailable("connection reset"), times=3))

    final = supervise(store, 2, light="steps").end()

    assert (final.exit_code, final.resumed_from, final.error) == (EXIT_COMPLETE, 3, "")
    assert store.left == 0


def test_a_call_that_fails_after_a_long_time_of_work_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def work() -> str:
        nonlocal now, calls
        now, calls = now + 10 * STORE_PATIENCE_S, calls + 1
        if calls == 1:
            raise Unavailable("connection reset")
        return "done"

    monkeypatch.setattr("trainer.patience.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("trainer.patience.FIRST_PAUSE_S", 0.01)

    assert patiently(work, threading.Event()) == "done"


def test_a_start_that_could_not_be_recorded_is_recorded_with_the_next_checkpoint(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    claim(store, 1)
    lost: list[Record] = []
    append = Log.append

    def lossy(log: RunLog, record: Record) -> RunState:
        if isinstance(record, Started) and not lost:
            lost.append(record)
            raise Unavailable("503 SlowDown")
        return append(log, record)

    monkeypatch.setattr(Log, "append", lossy)
    attempt = supervise(store, light="forever")
    wait_until(lambda: any(isinstance(r, Started) for r in records(store, RUN)), "the start is recorded")
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED
    assert [r for r in records(store, RUN) if isinstance(r, Started)] == lost


def test_a_stop_ends_the_wait_for_a_store_that_is_away_and_that_is_not_the_stores_fault(
    supervise: Supervise,
) -> None:
    store = with_a_checkpoint(Failing("download", Unavailable("connection reset")))
    attempt = supervise(store, 2, light="steps")
    wait_until(lambda: store.left < 10**9, "the store has been asked")

    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end() == Progress(exit_code=EXIT_PREEMPTED)


def test_a_result_that_cannot_be_pushed_is_the_stores_fault_and_not_the_runs(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.supervisor.PUSH_PATIENCE_S", 1.0)
    store = with_a_checkpoint(Failing("put", Unavailable("503 SlowDown")))

    final = supervise(store, 2, light="steps").end()

    assert (final.exit_code, final.error) == (EXIT_STORE_UNREACHABLE, "Unavailable: 503 SlowDown")
    assert state(store, RUN).committed_step == 3


class Ordered(MemoryStore):
    """Remembers what was written in which order; the first two samples are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []
        self.refusals = 2

    def put(self, key: str, body: bytes | Path) -> None:
        if "/samples/" in key and self.refusals:
            self.refusals -= 1
            raise Unavailable("503 SlowDown")
        super().put(key, body)
        self.written.append(key)

    def create(self, key: str, body: bytes) -> bool:
        won = super().create(key, body)
        self.written += [f"{key} {RUN_ENTRY.validate_json(body).record.kind}"] * won
        return won


def test_samples_and_events_are_in_the_store_before_the_final_commit(supervise: Supervise) -> None:
    """After it the run is over: if the node dies then, no other attempt will ship them."""
    store = Ordered()
    claim(store, 1)

    assert supervise(store, light="steps").end().exit_code == EXIT_COMPLETE

    commit = max(n for n, key in enumerate(store.written) if key.endswith("committed"))
    before = store.written[:commit]
    assert layout.sample_key(RUN, 6, "index.json") in before
    events = b"".join(store.get(key) for key in before if key.startswith(layout.events_prefix(RUN)))
    assert b'"step": 6' in events
    assert store.refusals == 0


def test_a_store_that_is_away_at_the_end_is_waited_for(supervise: Supervise) -> None:
    store = with_a_checkpoint(Failing("put", Unavailable("503 SlowDown"), times=3))

    final = supervise(store, 2, light="steps").end()

    assert (final.exit_code, store.left) == (EXIT_COMPLETE, 0)
    assert state(store, RUN).result is not None


def test_a_disk_that_cannot_be_written_ends_the_attempt_with_an_error(tmp_path: Path) -> None:
    store = MemoryStore()
    claim(store, 1)
    (tmp_path / "scratch").write_text("a file where a folder should be")
    supervisor = Supervisor(
        store,
        Assignment(run_id=RUN, attempt=1, incarnation=incarnation(1)),
        LIGHT_SPEC,
        Options(),
        scratch=tmp_path / "scratch",
        ledger=run_log(store, RUN),
    )

    final = supervisor.run()

    assert final.exit_code == 1
    assert final.error.startswith("NotADirectoryError: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\tand  more ", "two lines and more"),
        ("\udcff", "\\udcff"),
        ("x" * 1001, "x" * 1000 + "…"),
        ("é", "é"),
    ],
)
def test_an_error_fits_on_one_line_of_a_record(text: str, line: str) -> None:
    assert one_line(text) == line
