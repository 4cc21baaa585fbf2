"""The supervisor: what it starts, starts again, and when it ends, with real processes that play Ray."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import DEADLINE_S, wait_until

from orchestrator.control.term import Holder, in_office
from orchestrator.errors import PreflightFailed
from orchestrator.on_ray import detection
from orchestrator.on_ray.lineage import Lineage
from orchestrator.supervise import heads, supervision
from orchestrator.supervise import loop as supervise
from orchestrator.supervise.heads import CommandHead, Head, HeadFailed, RemoteHead
from orchestrator.supervise.supervision import LONGEST_PAUSE_S, STEADY_S, Tries, failed, final
from storage import layout
from storage.errors import Corrupt
from storage.memory import MemoryStore

HEAD = """
import os, signal, socket, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.signal(signal.SIGUSR1, lambda *_: server.close())
with open(sys.argv[2], "a") as pids:
    pids.write(f"{os.getpid()} {child.pid} {os.environ['RAY_health_check_period_ms']}\\n")
while server.fileno() >= 0:
    try:
        server.accept()[0].close()
    except OSError:
        pass
time.sleep(600)
"""
"""Listens as a head does, until SIGUSR1, and starts something in a session of its own, as Ray does."""

RESUME = """
import pathlib, sys, time
plan = pathlib.Path(sys.argv[1])
first, *rest = plan.read_text().split()
plan.write_text(" ".join(rest))
if first == "waits":
    time.sleep(600)
sys.exit(int(first))
"""
"""Exits with the next code of its plan."""


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class World:
    """A head to supervise and a plan of how ``resume`` ends."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(supervision, "LONGEST_PAUSE_S", 0.02)
        monkeypatch.setattr(supervise, "POLL_S", 0.02)
        monkeypatch.setattr(heads, "DEAF_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"127.0.0.1:{server.getsockname()[1]}"
        self.heads_file = folder / "heads"
        self.heads_file.touch()
        self.plan = folder / "plan"
        self.said: list[str] = []
        self.say: Callable[[str], None] = self.said.append
        self.thread: threading.Thread | None = None
        self.stop = threading.Event()
        self.store = MemoryStore()
        self.words = [sys.executable, "-c", HEAD, self.address.split(":")[1], str(self.heads_file)]
        self.head = CommandHead(self.words, self.address, "patient", self.stop)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Pid and child of each head that was started."""
        return [(int(a), int(b)) for a, b, _ in map(str.split, self.heads_file.read_text().splitlines())]

    def supervise(self, *codes: str, head: Head | None = None, host: str = "here") -> int | None:
        self.plan.write_text(" ".join(codes))
        command = [sys.executable, "-c", RESUME, str(self.plan)]
        return supervise.Supervisor(
            "cat",
            self.store,
            head or self.head,
            say=self.say,
            stop=self.stop,
            command=command,
            hostname=host,
        ).run()

    def begin(self, work: Callable[[], object]) -> threading.Thread:
        """Supervise on a thread, which ends with the test."""
        self.thread = threading.Thread(target=work)
        self.thread.start()
        return self.thread

    def takes_office(self, number: int, host: str, cluster: str = "") -> None:
        body = json.dumps({"host": host, "pid": 7, "cluster": cluster, "at": 0.0, "nonce": ""}).encode()
        self.store.put(layout.term("cat", number), body)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.stop.set()
    if made.thread:
        made.thread.join(DEADLINE_S)
    made.head.close()
    assert not [pid for pair in made.heads for pid in pair if lives(pid)], "a head outlived its supervisor"


@pytest.mark.parametrize("code", ["0", "100", "2", "4"])
def test_it_ends_with_the_sweep_or_with_what_no_retry_can_help(world: World, code: str) -> None:
    assert world.supervise("1", "3", "-9", code) == int(code)

    assert len(world.heads) == 1
    assert world.heads_file.read_text().split()[2] == "3000", "the profile did not reach the head"
    assert [line.partition("(")[0] for line in world.said[:3]] == [
        f"started a head at {world.address}",
        f"resuming cat at {world.address} ",
        "what worked on it ended with code 1; again in 0.01 s",
    ]


@pytest.mark.parametrize("victim", ["with all its children", "alone", "deaf"])
def test_a_head_that_dies_is_started_again_and_nothing_of_the_old_one_is_left(
    world: World, victim: str
) -> None:
    result: list[int | None] = []
    thread = world.begin(lambda: result.append(world.supervise("waits", "0")))
    wait_until(lambda: world.plan.exists() and world.plan.read_text() == "0", "it resumes")
    ((pid, child),) = world.heads

    if victim == "with all its children":
        os.kill(child, signal.SIGKILL)
    os.kill(pid, signal.SIGUSR1 if victim == "deaf" else signal.SIGKILL)
    thread.join(DEADLINE_S)

    assert result == [0]
    assert len(world.heads) == 2
    assert not lives(pid)
    assert not lives(child)
    assert any(line.startswith(f"the head at {world.address} is gone") for line in world.said)


def test_a_head_that_serves_nobody_is_started_anew_but_not_because_the_store_or_workers_are_missing(
    world: World,
) -> None:
    assert world.supervise("3", "6", "5", "1", "1", "1", "-9", "-6", "7", "7", "0") == 0
    assert len(world.heads) == 1
    assert world.supervise("7", "3", "7", "7", "6", "1", "0") == 0
    assert len(world.heads) == 2


def test_a_head_that_somebody_else_started_is_used_and_never_ended(world: World, tmp_path: Path) -> None:
    theirs = subprocess.Popen(
        [sys.executable, "-c", HEAD, world.address.split(":")[1], str(tmp_path / "theirs")],
        env={**os.environ, "RAY_health_check_period_ms": "1"},
    )
    try:
        wait_until(lambda: (tmp_path / "theirs").exists(), "it listens")
        assert world.supervise("7", "7", "7", "7", "0") == 0
        assert world.supervise("1", "0", head=RemoteHead(world.address)) == 0
        world.head.close()
        assert theirs.poll() is None
        assert world.heads == []
    finally:
        Lineage(theirs.pid).kill()
        theirs.wait()
    with pytest.raises(HeadFailed, match="nobody answers"):
        RemoteHead(world.address).ensure()


def test_a_head_that_does_not_stay_says_so_and_is_tried_again(world: World, tmp_path: Path) -> None:
    head = CommandHead([sys.executable, "-c", "raise SystemExit(7)"], world.address, "fast", world.stop)
    thread = world.begin(lambda: world.supervise(head=head))
    wait_until(lambda: len(world.said) >= 3, "it has tried")
    world.stop.set()
    thread.join(DEADLINE_S)

    assert "exited with code 7 (it must stay in the foreground" in world.said[0]
    with pytest.raises(HeadFailed, match="No such file"):
        CommandHead([str(tmp_path / "nothing")], world.address, "fast", threading.Event()).ensure()


@pytest.mark.parametrize(
    ("host", "cluster", "code"),
    [
        ("here", "", 0),
        ("here", "its own", 0),
        ("here", "10.0.0.1:1", supervision.EXIT_TAKEN_OVER),
        ("there", "", supervision.EXIT_TAKEN_OVER),
    ],
)
def test_a_sweep_that_another_cluster_takes_over_is_left_to_it(
    world: World, host: str, cluster: str, code: int
) -> None:
    def say(line: str) -> None:
        world.said.append(line)
        if line.startswith("resuming"):
            world.takes_office(len(world.said), host, cluster.replace("its own", world.address))

    world.say = say
    assert world.supervise("1", "0") == code
    if code:
        assert world.said[-1].startswith(f"cat was taken over by the controller on {host} (pid 7)")


def test_a_head_that_came_up_at_last_is_not_waited_for_any_more(world: World) -> None:
    class Late(RemoteHead):
        tries = iter([False] * 12 + [True, False, True])

        def ensure(self) -> str:
            if not next(self.tries):
                raise HeadFailed("not yet")
            return world.address

    assert world.supervise("1", "0", head=Late(world.address)) == 0
    assert world.said[11] == "not yet; again in 0.02 s"
    assert world.said[13].endswith("ended with code 1; again in 0.01 s")
    assert world.said[14] == "not yet; again in 0.01 s"


def test_a_watcher_that_does_not_die_is_no_reason_to_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel holds does not die of a kill: here nobody kills it at first."""
    held: list[subprocess.Popen[bytes]] = []

    class Held(subprocess.Popen[bytes]):
        def kill(self) -> None:
            held.append(self)

    monkeypatch.setattr(subprocess, "Popen", Held)
    monkeypatch.setattr(supervise, "KILL_S", 0.05)
    result: list[int | None] = []
    thread = world.begin(lambda: result.append(world.supervise("waits", "0")))
    wait_until(lambda: world.plan.exists() and world.plan.read_text() == "0", "it resumes")
    os.kill(world.heads[0][0], signal.SIGKILL)
    thread.join(DEADLINE_S)
    for process in held:
        process.send_signal(signal.SIGKILL)
        process.wait()

    assert (result, len(world.heads)) == ([0], 2)


def test_a_sweep_whose_last_controller_was_on_a_machine_that_is_gone_is_worked_on(world: World) -> None:
    world.takes_office(0, "gone", "10.0.0.1:1")
    assert world.supervise("1", "3", "6", "0") == 0
    world.store.put(layout.term("cat", 1), b"[]")  # nobody can say who that was, or that it is new
    assert world.supervise("1", "0") == 0


def test_who_took_office_last_is_read_from_the_store() -> None:
    store = MemoryStore()
    assert in_office(store, "cat") is None
    for number, host in enumerate(["a", "b"]):
        store.put(layout.term("cat", number), json.dumps({"host": host, "pid": number}).encode())
    assert in_office(store, "cat") == Holder(term=layout.term("cat", 1), host="b", pid=1)
    store.put(layout.term("cat", 2), b"[]")
    with pytest.raises(Corrupt):
        in_office(store, "cat")


def test_only_what_descends_from_it_is_killed_also_when_parents_are_gone() -> None:
    program = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        assert parent.stdout is not None
        with parent.stdout as stdout:
            child = int(stdout.readline())
        lineage = Lineage(parent.pid)
        lineage.look()
        assert {process.pid for process in lineage.living()} == {parent.pid, child}
        parent.kill()
        parent.wait()
        assert lives(child)

        assert lineage.kill() == 1

        assert not lives(child)
        assert lives(stranger.pid)
        assert lineage.kill() == 0
    finally:
        stranger.kill()
        stranger.wait()


@given(
    codes=st.lists(st.tuples(st.sampled_from([None, 1, 3, 5, 6, -9, 130]), st.floats(0, 300)), max_size=80)
)
def test_pauses_grow_with_failures_in_a_row_up_to_a_limit(codes: list[tuple[int | None, float]]) -> None:
    tries = Tries()
    for code, lasted_s in codes:
        assert code is None or final(code) is None
        before, tries = tries, failed(tries, code, lasted_s)
        assert 0 < tries.pause_s <= LONGEST_PAUSE_S
        if lasted_s < STEADY_S:
            assert tries.pause_s >= before.pause_s
        else:
            assert tries.failures == 1
        assert code != 3 or tries.pause_s <= max(8.0, before.pause_s)


def test_a_profile_of_health_checks_is_chosen_by_name() -> None:
    assert detection.system_config({}) == detection.PROFILES["fast"]
    assert detection.system_config({detection.ENVIRONMENT: "patient"}) == detection.PROFILES["patient"]
    assert detection.as_environment("fast")["RAY_health_check_failure_threshold"] == "3"
    assert set(detection.PROFILES["fast"]) == set(detection.PROFILES["patient"])
    with pytest.raises(PreflightFailed, match="one of fast, patient"):
        detection.system_config({detection.ENVIRONMENT: "quick"})


def test_sigterm_ends_the_command_with_all_that_it_started(world: World, tmp_path: Path) -> None:
    """The store does not answer, so the real ``resume`` fails again and again."""
    command = [sys.executable, "-m", "orchestrator", "supervise", "cat", "--address", world.address]
    store = ["--store", "s3://bucket/p?endpoint=http://127.0.0.1:1"]
    head = ["--head", shlex.join(world.words), "--detection", "patient"]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true"}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *store, *head], env={**os.environ, **keys}, stderr=output)
    try:
        wait_until(lambda: "resuming cat at" in log.read_text(), "it resumes")
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        code = process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()

    assert code == 128 + signal.SIGTERM
    assert "asked to stop; what was started here ends" in log.read_text()
    assert len(below) >= 3
    assert not [child for child in below if lives(child.pid)]
