"""One attempt from claim to exit: with the real training process, and with a light one for its bad days."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support import light_trainer
from support.attempts import Attempt
from support.gate import Gate
from support.runs import claimed, committed, ended, incarnation
from support.tiny_world import tiny_spec
from support.training import contents, lay_out, newest
from support.waiting import wait_until

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.errors import AccessDenied, Fenced, Unavailable
from storage.log import Log, RunLog, run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import (
    RUN_ENTRY,
    Committed,
    EndReason,
    Quarantined,
    Record,
    Started,
)
from storage.run_state import RunState
from trainer.attempt import run_attempt
from trainer.config import Base, Dataset, RunSpec
from trainer.patience import MAX_ERROR_CHARACTERS, STORE_PATIENCE_S, one_line, patiently
from trainer.rundir import (
    EXIT_COMPLETE,
    EXIT_PREEMPTED,
    EXIT_STORE_UNREACHABLE,
    EXIT_UNFIT,
    CheckpointPolicy,
    Options,
    RunDir,
    end_reason,
    read_events,
)
from trainer.stop import Stop
from trainer.supervisor import Assignment, Progress, Supervisor
from trainer.training_process import STUCK, TrainingProcess

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RUN = "cat-r16"
EVERY_STEP = CheckpointPolicy(every_steps=1, every_s=None)


def claim(store: ObjectStore, attempt: int) -> None:
    run_log(store, RUN).append(claimed(attempt))


def state(store: ObjectStore) -> RunState:
    return run_log(store, RUN).refresh()


def records(store: ObjectStore) -> list[Record]:
    log = run_log(store, RUN)
    log.refresh()
    return [entry.record for entry in log.entries()]


def shipped(store: ObjectStore, prefix: str) -> bytes:
    return b"".join(store.get(info.key) for info in store.list(prefix))


def living_in_group(group: int) -> list[int]:
    """The processes of a group, without those that are dead and wait for somebody to ask."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


Supervise = Callable[..., Attempt]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Begin attempts, and check that they leave neither files nor processes."""
    begun: list[Attempt] = []
    scratch = tmp_path / "scratch"

    def begin(
        store: ObjectStore,
        attempt: int = 1,
        *,
        spec: RunSpec | None = None,
        cache: Path | None = None,
        light: str | None = None,
        process: TrainingProcess | None = None,
        who: str | None = None,
        stall_timeout_s: float | None = None,
    ) -> Attempt:
        if light:
            process = TrainingProcess((sys.executable, light_trainer.__file__, light))
        supervisor = Supervisor(
            store,
            Assignment(run_id=RUN, attempt=attempt, incarnation=who or incarnation(attempt)),
            spec or LIGHT_SPEC,
            Options(
                checkpoint=EVERY_STEP,
                threads=1,
                cache_dir=str(cache) if cache else None,
                stall_timeout_s=stall_timeout_s,
            ),
            scratch=scratch,
            ledger=run_log(store, RUN),
            process=process,
        )
        begun.append(Attempt(supervisor, process))
        return begun[-1]

    yield begin
    for attempt in begun:
        attempt.supervisor.stop(0.0)
        attempt.end()
        if attempt.process:
            assert attempt.process.exit_code is not None, "a process outlived its supervisor"
            assert living_in_group(attempt.process.pid) == [], "its children outlived it"
    assert list(scratch.glob("*")) == [], "something was left on the disk"


LIGHT_SPEC = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))


def test_killed_then_stopped_then_resumed_past_a_damaged_checkpoint_equals_never_interrupted(
    world: Path, supervise: Supervise, tmp_path: Path
) -> None:
    """The life of a run in three attempts, each in a process of its own, over a store in a folder."""
    gate = Gate(tmp_path)  # the run ends when the third is at work, however late that is
    base = {"max_train_steps": 12, "lr_warmup_steps": 0}
    spec = tiny_spec(world / "base", world / "images", base=base, **gate.blocks)
    store = DirectoryStore(tmp_path / "store")
    processes = [TrainingProcess() for _ in range(3)]  # the later ones are warm when their turn comes

    def attempt(number: int) -> Attempt:
        claim(store, number)
        return supervise(store, number, spec=spec, cache=world / "cache", process=processes[number - 1])

    first = attempt(1)
    wait_until(lambda: state(store).committed_step >= 2, "two steps are committed")
    os.kill(processes[0].pid, signal.SIGKILL)
    killed = first.end()
    assert killed.exit_code == -signal.SIGKILL
    kept = state(store).committed_step
    run_log(store, RUN).append(ended(1, EndReason.KILLED))

    second = attempt(2)
    wait_until(lambda: state(store).committed_step >= min(kept + 2, 12), "two more steps are committed")
    second.supervisor.stop(grace_s=60.0)
    stopped = second.end()
    assert (stopped.exit_code, stopped.resumed_from, stopped.error) == (EXIT_PREEMPTED, kept, "")
    assert state(store).committed_step == stopped.step, "the step in flight was not saved"
    run_log(store, RUN).append(ended(2, EndReason.DRAINED))

    damaged = state(store).checkpoints[-1]
    before_it = state(store).checkpoints[-2]
    key = layout.committed_file(RUN, damaged, "adapter.safetensors")
    body = bytearray(store.get(key))
    body[-1] ^= 1
    store.put(key, bytes(body))

    gate.open()
    completed = attempt(3).end()
    assert (completed.exit_code, completed.resumed_from) == (EXIT_COMPLETE, before_it.step)
    assert [r.checkpoint for r in records(store) if isinstance(r, Quarantined)] == [damaged.ref]
    over = state(store)
    assert over.result is not None
    fetched = CheckpointStore(store, RUN, run_log(store, RUN)).fetch(over.result, tmp_path / "step-000000012")
    straight = lay_out(tmp_path / "straight", spec, cache=world / "cache")
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    assert contents(fetched) == contents(newest(straight))

    starts = [r for r in records(store) if isinstance(r, Started)]
    assert [(s.attempt, s.step) for s in starts] == [(1, 0), (2, kept), (3, before_it.step)]
    events = shipped(store, layout.events_prefix(RUN, 3))
    assert events.splitlines()[-1].startswith(b'{"event": "complete"')


def test_a_run_completes_and_says_how_far_it_came(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)

    final = supervise(store, light="steps").end()

    assert final.first_step_at is not None
    assert final == Progress(
        step=6,
        resumed_from=0,
        first_step_at=final.first_step_at,
        step_s=light_trainer.PAUSE_S,
        loss=1 / 6,
        exit_code=0,
        storing=final.storing,
    )
    stored = final.storing
    assert (stored.committed_step, stored.queued, stored.errors) == (6, 0, 0)
    assert 1 <= stored.commits <= 6, "superseded ones are skipped"
    assert stored.sent_bytes == stored.state_bytes == 9 * stored.commits, "too small to be packed"
    over = state(store)
    assert over.result is not None
    assert over.result.step == 6
    assert store.get(layout.committed_file(RUN, over.result, "adapter.safetensors")) == b"weights 6"
    assert shipped(store, layout.events_prefix(RUN, 1)).count(b'"step"') == 12


def test_an_attempt_that_is_fenced_is_killed_and_says_that_it_was_superseded(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="forever")
    wait_until(lambda: state(store).committed_step > 0, "something is committed")

    run_log(store, RUN).append(ended(1, EndReason.NODE_UNREACHABLE))
    claim(store, 2)
    final = attempt.end()

    assert (final.superseded, final.exit_code) == (True, -signal.SIGKILL)
    assert "attempt 2 is the newest, attempt 1 is fenced" in final.error
    assert all(r.attempt == 1 for r in records(store) if isinstance(r, Committed))


@pytest.mark.parametrize(
    ("attempt", "who"), [pytest.param(1, None, id="older"), pytest.param(2, "f" * 8, id="other incarnation")]
)
def test_an_order_that_is_not_the_newest_claim_is_not_begun(
    attempt: int, who: str | None, supervise: Supervise
) -> None:
    store = MemoryStore()
    for record in (claimed(1), committed(3), ended(1), claimed(2)):
        run_log(store, RUN).append(record)
    before = records(store)

    final = supervise(store, attempt, who=who, light="steps").end()

    assert (final.superseded, final.exit_code, final.step) == (True, EXIT_PREEMPTED, 0)
    assert final.error == f"{RUN}: attempt {attempt} is over, or was never claimed"
    assert records(store) == before
    assert list(store.list(layout.events_prefix(RUN))) == []


def test_a_trainer_that_does_not_stop_in_time_is_killed_with_its_children(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="deaf")
    wait_until(lambda: state(store).committed_step == 1, "its step is committed")

    began = time.monotonic()
    attempt.supervisor.stop(grace_s=0.2)
    final = attempt.end()

    assert final.exit_code == -signal.SIGKILL
    assert time.monotonic() - began >= 0.2


def test_a_shorter_grace_replaces_a_longer_one_and_never_the_other_way(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="deaf")
    wait_until(lambda: state(store).committed_step == 1, "its step is committed")

    attempt.supervisor.stop(grace_s=600.0)
    attempt.supervisor.stop(grace_s=0.0)
    attempt.supervisor.stop(grace_s=600.0)

    assert attempt.end().exit_code == -signal.SIGKILL


def test_an_attempt_may_be_stopped_before_it_begins(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="forever")
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED


def test_a_trainer_that_our_stop_ends_before_it_listens_was_preempted_and_not_killed(
    supervise: Supervise,
) -> None:
    store = MemoryStore()
    claim(store, 1)
    process = TrainingProcess((sys.executable, "-c", "import time; time.sleep(600)"))
    attempt = supervise(store, process=process)
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED


def test_a_trainer_that_somebody_else_ends_was_killed(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    process = TrainingProcess((sys.executable, "-c", "import time; time.sleep(600)"))
    attempt = supervise(store, process=process)
    os.kill(process.pid, signal.SIGTERM)

    assert attempt.end().exit_code == -signal.SIGTERM


def test_events_that_are_none_and_errors_that_no_record_could_carry_do_no_harm(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)

    final = supervise(store, light="broken").end()

    assert (final.exit_code, final.step) == (1, 1)
    assert final.error.startswith("OSError: no file \\udcff.pngxxx")
    assert len(final.error) == MAX_ERROR_CHARACTERS + 1
    run_log(store, RUN).append(ended(1).model_copy(update={"detail": final.error}))
    assert shipped(store, layout.logs_prefix(RUN, 1)) == b"a line\nand the last, without an end"


def test_a_damaged_final_checkpoint_is_not_pushed_and_not_waited_for(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)

    final = supervise(store, light="damaged").end()

    assert final.exit_code == EXIT_COMPLETE
    assert final.error.startswith("Corrupt: "), "why there is no result"
    assert "adapter.safetensors" in final.error
    assert state(store).result is None


class Failing(MemoryStore):
    """Refuses calls of one kind with one error, at most so many times."""

    def __init__(self, call: str, error: Exception, times: int = 10**9) -> None:
        super().__init__()
        self._call, self._error, self.left = call, error, times
        self.armed = False

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        self._maybe("list")
        return super().list(prefix, after)

    def put(self, key: str, body: bytes | Path) -> None:
        if "/data/" in key:
            self._maybe("put")
        super().put(key, body)

    def download(self, key: str, target: Path) -> None:
        self._maybe("download")
        super().download(key, target)

    def delete(self, keys: Iterable[str]) -> None:
        super().delete(keys)

    def _maybe(self, call: str) -> None:
        if self.armed and call == self._call and self.left > 0:
            self.left -= 1
            raise self._error


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


class InTheKernel:
    """Stands for a process that no signal reaches any more: it cannot be made without a broken driver."""

    def __init__(self, real: subprocess.Popen[bytes]) -> None:
        self.pid, self.stdin = real.pid, real.stdin

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        pass

    def wait(self, timeout: float) -> None:
        raise subprocess.TimeoutExpired("trainer", timeout)


@pytest.mark.parametrize("end", ["it hangs", "a stop", "a newer claim"])
def test_a_trainer_that_cannot_be_killed_ends_the_attempt_with_what_it_saved_and_blames_the_node(
    end: str, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing("put", Unavailable("503 SlowDown"))
    claim(store, 1)
    process = TrainingProcess((sys.executable, light_trainer.__file__, "forever"))
    attempt = supervise(store, process=process, stall_timeout_s=1.0 if end == "it hangs" else None)
    wait_until(lambda: state(store).committed_step > 0, "something is committed")
    store.armed = True
    before = state(store).committed_step
    wait_until(lambda: attempt.supervisor.progress.step > before + 2, "more is saved")
    os.kill(process.pid, signal.SIGSTOP)
    real = process._process
    monkeypatch.setattr(os, "killpg", lambda group, number: setattr(store, "armed", False))
    process._process = InTheKernel(real)  # type: ignore[assignment]
    try:
        if end == "a stop":
            attempt.supervisor.stop(grace_s=0.0)
        elif end == "a newer claim":
            run_log(store, RUN).append(ended(1, EndReason.NODE_UNREACHABLE))
            attempt.supervisor._on_fenced(Fenced("attempt 1 is fenced"))
        final = attempt.end()
    finally:
        monkeypatch.undo()
        process._process = real
        real.kill()
        real.wait()
        process.kill()

    assert (final.exit_code, final.superseded) == (EXIT_UNFIT, end == "a newer claim")
    assert final.error.startswith(STUCK)
    assert ("nothing happened for" in final.error) == (end == "it hangs")
    if end != "a newer claim":
        assert state(store).committed_step >= final.step - 1 > before, "what it had saved is pushed"


def with_a_checkpoint(store: Failing) -> Failing:
    """A run with one real checkpoint, whose second attempt is claimed. From here on the store fails."""
    body = b"weights 3"
    commit = committed(3)
    whole = commit.model_copy(
        update={"files": (commit.files[0].model_copy(update={"size_bytes": len(body), "sha256": sha(body)}),)}
    )
    for record in (claimed(1), whole, ended(1), claimed(2)):
        run_log(store, RUN).append(record)
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
    wait_until(lambda: any(isinstance(r, Started) for r in records(store)), "the start is recorded")
    attempt.supervisor.stop(grace_s=60.0)

    assert attempt.end().exit_code == EXIT_PREEMPTED
    assert [r for r in records(store) if isinstance(r, Started)] == lost


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
    assert state(store).committed_step == 3


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
    assert state(store).result is not None


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


def test_a_training_process_sees_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN_PATH", "SLACK_WEBHOOK"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("HF_TOKEN", "for the base model")
    seen = tmp_path / "seen"
    program = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
    process = TrainingProcess((sys.executable, "-c", program))
    wait_until(lambda: process.exit_code is not None, "it has ended")
    process.kill()

    assert "canary" not in seen.read_text()
    assert '"HF_TOKEN": "for the base model"' in seen.read_text()


def test_a_process_that_is_gone_can_be_given_work_stopped_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = TrainingProcess((sys.executable, "-c", "raise SystemExit(3)"))
    wait_until(lambda: process.exit_code == 3, "it has ended")

    process.begin(tmp_path)
    process.terminate()
    process.kill()
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: pytest.fail("its number may be another's now"))
        process.kill()

    assert process.exit_code == 3


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


def test_a_line_that_is_still_being_written_is_read_later(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.events.write_text('{"event": "step", "step": 1}\nnot json\n{"event": "st')
    read = list(read_events(run_dir.events))
    with run_dir.events.open("a") as file:
        file.write('ep", "step": 2}\n')

    assert [event["step"] for _, event in read] == [1]
    assert [event["step"] for _, event in read_events(run_dir.events, read[-1][0])] == [2]


def test_an_attempt_claimed_after_the_result_was_committed_trains_nothing(supervise: Supervise) -> None:
    """The older one committed it just before the claim; from a final checkpoint nothing could resume."""
    store = MemoryStore()
    claim(store, 1)
    supervise(store, light="steps").end()
    result = state(store).result
    run_log(store, RUN).append(ended(1))
    claim(store, 2)

    final = supervise(store, 2, light="steps").end()

    assert (final.exit_code, final.superseded) == (EXIT_PREEMPTED, True)
    assert "the final checkpoint is committed already" in final.error
    assert state(store).result == result
    assert state(store).quarantined == ()
