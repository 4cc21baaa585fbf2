"""Beside a controller: whom we connect to, who may cancel, who is still there. No cluster is started."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from support.fake_cluster import FakeCluster, run_to_end, small_sweep

from orchestrator.commands.cancelling import ask_to_cancel
from orchestrator.control.cluster import NoCluster
from orchestrator.control.controller import Controller
from orchestrator.errors import NoAnswer, OrchestrateError, PreflightFailed
from orchestrator.launching import launch
from orchestrator.on_ray import local_ray
from orchestrator.reports.watch import watch
from orchestrator.supervise import supervision
from storage import layout
from storage.memory import MemoryStore


def test_a_cluster_elsewhere_without_authentication_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for address in ("10.0.0.1:6379", "auto"):
        with pytest.raises(PreflightFailed, match=r"E2603 .* authentication is off") as refused:
            launch.connect(address)
        assert refused.value.exit_code == 3


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "localhost:99999"])
def test_an_address_at_which_nothing_listens_is_known_without_ray(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it would fail
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        there = address.format(port=bound.getsockname()[1])
        with pytest.raises(PreflightFailed, match=r"E2601 no Ray cluster answers at .*: nothing answers"):
            launch.connect(there, insecure=True)


def test_what_takes_connections_and_says_nothing_is_told_from_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a head does whose process is stopped: the kernel takes the connection for it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(local_ray, "HEAR_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        address = f"127.0.0.1:{stopped.getsockname()[1]}"
        with pytest.raises(NoAnswer, match=f"{address} does not answer.* says nothing") as raised:
            launch.connect(address, insecure=True)
        assert raised.value.exit_code == supervision.EXIT_NO_ANSWER
        assert local_ray.answers(address)


def test_a_pid_that_is_somebody_elses_by_now_is_no_cluster_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, number: int) -> None:
        raise PermissionError

    cluster = local_ray.LocalRay(address="127.0.0.1:1", host_pid=1, raylet_pids={}, dashboard="")
    assert not cluster.alive
    monkeypatch.setattr(os, "kill", refused)
    assert not cluster.alive


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:6379", True),
        ("localhost:6379", True),
        ("10.0.0.1:6379", False),
        ("127.0.0.1.evil.com:1", False),
    ],
)
def test_only_loopback_gets_the_local_token(address: str, local: bool) -> None:
    assert local_ray.is_local(address) is local


def test_a_token_is_made_once_and_for_our_eyes_only(tmp_path: Path) -> None:
    token = tmp_path / "ray-token"
    local_ray._make_token(token)
    first = token.read_text()
    local_ray._make_token(token)
    assert (token.read_text(), len(first)) == (first, 64)
    assert os.stat(token).st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [token]


def test_nobody_cancels_beside_the_controller_where_two_writers_could_both_win() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    run_id = sweep.runs[0].run_id
    with pytest.raises(OrchestrateError, match="only the controller may cancel"):
        ask_to_cancel(store, [run_id], None, atomic=False)
    assert list(store.list("runs/")) == []
    assert ask_to_cancel(store, [run_id], None, atomic=True) == {run_id: "CANCELLED"}


def test_watching_a_sweep_that_nobody_works_on_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.reports.watch.ABANDONED_S", -1.0)
    with pytest.raises(OrchestrateError, match=r"no controller works on cat .* orchestrate resume cat"):
        watch(small_sweep(runs=1), MemoryStore(), controller=lambda: None)


def test_what_a_killed_controller_left_of_a_finished_sweep_goes_without_a_cluster() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=1)
    cluster = FakeCluster(store, sweep, nodes=1)
    controller = Controller(sweep, store, cluster, clock=cluster.clock)
    assert list(run_to_end(controller, cluster))
    left = f"runs/{sweep.runs[0].run_id}/data/000001-00000000/000000001/adapter.safetensors"
    store.put(left, b"uploaded by a ghost")
    store.delete([layout.sweep_snapshot(sweep.name)])  # it was killed before it could say that all was tidy

    again = Controller(sweep, store, NoCluster())
    again.tick()

    assert again.done
    assert store.head(left) is None


def test_heads_start_one_at_a_time_and_one_that_fails_lets_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would both find the dashboard's port free."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(local_ray, "START_TIMEOUT_S", 600.0)
    with pytest.raises(OSError, match="it did not start"), local_ray.one_at_a_time():
        raise OSError("it did not start")
    began, ended = threading.Event(), threading.Event()

    def second() -> None:
        with local_ray.one_at_a_time():
            began.set()
        ended.set()

    with local_ray.one_at_a_time():
        other = threading.Thread(target=second, daemon=True)
        other.start()
        assert not began.wait(0.3)
    assert ended.wait(60)
