"""One attempt from claim to exit: with the real training process, and with a light one."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support import light_trainer
from support.attempts import Attempt
from support.gate import Gate
from support.runs import RUN, claimed, committed, ended, lived
from support.supervised import Supervise, claim
from support.sweeps import records, state
from support.tiny_world import tiny_spec
from support.training import contents, lay_out, newest
from support.waiting import wait_until

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from storage.records import Committed, EndReason, Quarantined, Started
from trainer.attempt import run_attempt
from trainer.patience import MAX_ERROR_CHARACTERS
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, RunDir, read_events
from trainer.stop import Stop
from trainer.supervisor import Progress
from trainer.training_process import TrainingProcess

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def shipped(store: ObjectStore, prefix: str) -> bytes:
    return b"".join(store.get(info.key) for info in store.list(prefix))


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
    wait_until(lambda: state(store, RUN).committed_step >= 2, "two steps are committed")
    os.kill(processes[0].pid, signal.SIGKILL)
    killed = first.end()
    assert killed.exit_code == -signal.SIGKILL
    kept = state(store, RUN).committed_step
    run_log(store, RUN).append(ended(1, EndReason.KILLED))

    second = attempt(2)
    wait_until(lambda: state(store, RUN).committed_step >= min(kept + 2, 12), "two more steps are committed")
    second.supervisor.stop(grace_s=60.0)
    stopped = second.end()
    assert (stopped.exit_code, stopped.resumed_from, stopped.error) == (EXIT_PREEMPTED, kept, "")
    assert state(store, RUN).committed_step == stopped.step, "the step in flight was not saved"
    run_log(store, RUN).append(ended(2, EndReason.DRAINED))

    damaged = state(store, RUN).checkpoints[-1]
    before_it = state(store, RUN).checkpoints[-2]
    key = layout.committed_file(RUN, damaged, "adapter.safetensors")
    body = bytearray(store.get(key))
    body[-1] ^= 1
    store.put(key, bytes(body))

    gate.open()
    completed = attempt(3).end()
    assert (completed.exit_code, completed.resumed_from) == (EXIT_COMPLETE, before_it.step)
    assert [r.checkpoint for r in records(store, RUN) if isinstance(r, Quarantined)] == [damaged.ref]
    over = state(store, RUN)
    assert over.result is not None
    fetched = CheckpointStore(store, RUN, run_log(store, RUN)).fetch(over.result, tmp_path / "step-000000012")
    straight = lay_out(tmp_path / "straight", spec, cache=world / "cache")
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    assert contents(fetched) == contents(newest(straight))

    starts = [r for r in records(store, RUN) if isinstance(r, Started)]
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
    over = state(store, RUN)
    assert over.result is not None
    assert over.result.step == 6
    assert store.get(layout.committed_file(RUN, over.result, "adapter.safetensors")) == b"weights 6"
    assert shipped(store, layout.events_prefix(RUN, 1)).count(b'"step"') == 12


def test_an_attempt_that_is_fenced_is_killed_and_says_that_it_was_superseded(supervise: Supervise) -> None:
    store = MemoryStore()
    claim(store, 1)
    attempt = supervise(store, light="forever")
    wait_until(lambda: state(store, RUN).committed_step > 0, "something is committed")

    run_log(store, RUN).append(ended(1, EndReason.NODE_UNREACHABLE))
    claim(store, 2)
    final = attempt.end()

    assert (final.superseded, final.exit_code) == (True, -signal.SIGKILL)
    assert "attempt 2 is the newest, attempt 1 is fenced" in final.error
    assert all(r.attempt == 1 for r in records(store, RUN) if isinstance(r, Committed))


@pytest.mark.parametrize(
    ("attempt", "who"), [pytest.param(1, None, id="older"), pytest.param(2, "f" * 8, id="other incarnation")]
)
def test_an_order_that_is_not_the_newest_claim_is_not_begun(
    attempt: int, who: str | None, supervise: Supervise
) -> None:
    store = MemoryStore()
    lived(store, RUN, claimed(1), committed(3), ended(1), claimed(2))
    before = records(store, RUN)

    final = supervise(store, attempt, who=who, light="steps").end()

    assert (final.superseded, final.exit_code, final.step) == (True, EXIT_PREEMPTED, 0)
    assert final.error == f"{RUN}: attempt {attempt} is over, or was never claimed"
    assert records(store, RUN) == before
    assert list(store.list(layout.events_prefix(RUN))) == []


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
    assert state(store, RUN).result is None


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


def test_an_attempt_claimed_after_the_result_was_committed_trains_nothing(supervise: Supervise) -> None:
    """The older one committed it just before the claim; from a final checkpoint nothing could resume."""
    store = MemoryStore()
    claim(store, 1)
    supervise(store, light="steps").end()
    result = state(store, RUN).result
    run_log(store, RUN).append(ended(1))
    claim(store, 2)

    final = supervise(store, 2, light="steps").end()

    assert (final.exit_code, final.superseded) == (EXIT_PREEMPTED, True)
    assert "the final checkpoint is committed already" in final.error
    assert state(store, RUN).result == result
    assert state(store, RUN).quarantined == ()


def test_a_line_that_is_still_being_written_is_read_later(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.events.write_text('{"event": "step", "step": 1}\nnot json\n{"event": "st')
    read = list(read_events(run_dir.events))
    with run_dir.events.open("a") as file:
        file.write('ep", "step": 2}\n')

    assert [event["step"] for _, event in read] == [1]
    assert [event["step"] for _, event in read_events(run_dir.events, read[-1][0])] == [2]
