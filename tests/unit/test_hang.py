"""When a process that shows nothing hangs: it is a matter of what was looked at, never of the clock alone."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.grid.schema import Recovery
from trainer.evidence import Evidence, attributed
from trainer.hang import LONG_STEPS, LONGEST_LOOK_S, Quiet, Signs, hangs, looked, signs_of, where
from trainer.pulse import Pulse
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, RunDir, append_event
from trainer.stop import Stop

DUMP = """Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "/usr/lib/python3.11/threading.py", line 629 in wait

Current thread 0x00007f2 (most recent call first):
  File "/app/trainer/data.py", line 88 in batch
  File "/app/trainer/loop.py", line 150 in _accumulate
"""


def after(*looks: tuple[float, Signs]) -> Quiet:
    quiet = Quiet()
    for at, signs in looks:
        quiet = looked(quiet, signs, at)
    return quiet


def test_quiet_seconds_add_up_until_there_is_a_sign() -> None:
    same, other = Signs(events_bytes=1), Signs(events_bytes=2)

    assert after((0, same), (1, same), (2.5, same)).seconds == 2.5
    assert after((0, same), (1, same), (2, other)).seconds == 0.0
    assert after((0, same)).seconds == 0.0, "the first look is the beginning"


def test_whoever_was_frozen_with_the_process_does_not_take_it_for_dead() -> None:
    same = Signs()

    assert after((0, same), (10_000, same)).seconds == LONGEST_LOOK_S


@given(st.lists(st.tuples(st.floats(-10, 5000), st.integers(0, 1)), max_size=30), st.floats(1, 1000))
def test_only_looks_without_a_sign_make_a_hang(steps: list[tuple[float, int]], timeout_s: float) -> None:
    quiet, now, events = Quiet(), 0.0, 0
    for passed, told in steps:
        now, events = now + passed, events + told
        quiet = looked(quiet, Signs(events_bytes=events), now)
        assert 0.0 <= quiet.seconds <= LONGEST_LOOK_S * len(steps)
        if told:
            assert not hangs(quiet, timeout_s, 0.0)


def test_a_long_step_is_waited_for_and_without_a_timeout_everything() -> None:
    quiet = Quiet(signs=Signs(), looked_at=0.0, seconds=700.0)

    assert hangs(quiet, 600.0, 1.0)
    assert not hangs(quiet, 600.0, 700.0 / LONG_STEPS)
    assert not hangs(quiet, None, 1.0)


def test_events_and_touches_and_what_is_written_before_the_first_step_are_signs(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.alive.touch()
    os.utime(run_dir.alive, ns=(0, 0))
    before = signs_of(run_dir, 5_000)
    assert signs_of(run_dir, 6_000) == before, "a few bytes are none"
    assert signs_of(run_dir, 2_000_000) != before

    stop = Stop()
    stop.alive = Pulse(run_dir.alive)
    stop.check()
    touched = signs_of(run_dir, 0)
    assert touched != before

    append_event(run_dir.events, "step", step=1)
    assert signs_of(run_dir, 0) != touched


def test_a_pulse_without_a_file_harms_nobody(tmp_path: Path) -> None:
    Pulse(tmp_path / "not there")()


@pytest.mark.parametrize(
    ("dump", "at"),
    [(DUMP, "data.py:88 in batch"), (f"noise\n{DUMP}", "data.py:88 in batch"), ("", ""), ("Thread 0x1", "")],
)
def test_where_it_hung_is_the_innermost_line_of_the_main_thread(dump: str, at: str) -> None:
    assert where(dump) == at


def test_a_real_dump_is_understood(tmp_path: Path) -> None:
    import faulthandler

    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    with (tmp_path / "dump").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    release.set()
    other.join()

    assert where((tmp_path / "dump").read_text()).startswith("test_hang.py:")


@given(
    st.integers(-40, 255),
    st.builds(
        Evidence,
        error_type=st.sampled_from(["", "RuntimeError", "MemoryError", "OutOfMemoryError", "Diverged"]),
        hung_s=st.sampled_from([0.0, 700.0]),
        oom_kills=st.integers(0, 2),
        disk_free_bytes=st.sampled_from([None, 0, 10**12]),
    ),
    st.sampled_from(["", "CUDA error: x", "CUDA out of memory", "No space left on device", "boom"]),
)
def test_every_end_has_a_reason_and_an_orderly_one_is_never_held_against_the_run(
    code: int, evidence: Evidence, error: str
) -> None:
    reason = attributed(code, evidence, error)

    if code == EXIT_PREEMPTED:
        assert reason == "DRAINED"
    if code == EXIT_COMPLETE:
        assert reason == "APP_ERROR", "complete, and yet without a result"
    if evidence == Evidence() and code < 0:
        assert reason == "KILLED"


def test_how_long_a_trainer_may_be_quiet_is_a_time_in_the_sweeps_file() -> None:
    assert Recovery().stall_timeout_s == 600.0
    assert Recovery(stall_timeout="90s").stall_timeout_s == 90.0
    with pytest.raises(ValueError, match="must be a time"):
        Recovery(stall_timeout="soon")
