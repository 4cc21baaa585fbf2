"""The network that the rows rely on: its cables and ways can be cut one by one, and nothing of it stays."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from support.cluster import wait_for
from support.namespaces import PREFIX, Machine, Network, network, why_no_namespaces

pytestmark = pytest.mark.netns

ENDED_PID = 2**22 + 1
"""More than Linux gives to any process."""


@pytest.fixture
def net() -> Iterator[Network]:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with network() as net:
        yield net


def test_a_cable_and_a_way_can_be_cut_and_mended(net: Network) -> None:
    one, two = net.add("one"), net.add("two")
    with listening(two), listening(net.hub):
        wait_for("the servers", lambda: reaches(one, two) and reaches(one, net.hub), 20)
        one.unplug()
        assert not reaches(one, two)
        assert not reaches(one, net.hub)
        one.plug_in()
        wait_for("the way back", lambda: reaches(one, two), 20)
        one.lose_way_to(two)
        assert not reaches(one, two)
        assert reaches(one, net.hub)
        one.find_way_to(two)
        wait_for("the way back", lambda: reaches(one, two), 20)


def test_a_frozen_machine_stands_still_and_a_power_cut_leaves_nothing(net: Network) -> None:
    machine = net.add("one")
    parent = machine.start(["sh", "-c", "sleep 600; true"], {}, subprocess.DEVNULL)
    wait_for("the child", lambda: any(p.name() == "sleep" for p in machine.processes("sleep 600")), 20)
    machine.freeze()
    assert {psutil.Process(pid).status() for pid in machine.pids} == {psutil.STATUS_STOPPED}
    machine.thaw()
    wait_for(
        "life", lambda: psutil.STATUS_STOPPED not in {psutil.Process(p).status() for p in machine.pids}, 20
    )
    machine.power_off()
    parent.wait()
    assert machine.pids == []


def test_a_network_leaves_another_one_of_the_same_test_alone(net: Network) -> None:
    one = net.add("one")
    with network() as other:
        other.add("one")
    with listening(net.hub):
        wait_for("the server", lambda: reaches(one, net.hub), 20)


def test_what_a_killed_test_left_is_removed_by_the_next_one() -> None:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    left = f"{PREFIX}-{ENDED_PID}-n1"
    subprocess.run(["ip", "netns", "add", left], check=True)
    machine = Machine("n1", "", left, None)
    orphan = machine.start(["sleep", "600"], {}, subprocess.DEVNULL)
    wait_for("a process on it", lambda: machine.pids, 20)
    with network():
        orphan.wait(timeout=20)
        assert left not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    machine.power_off()  # nothing is left to kill; this process only takes note of it


def reaches(machine: Machine, other: Machine) -> bool:
    connect = f"import socket; socket.create_connection(({other.address!r}, 8000), timeout=0.5)"
    done = subprocess.run(machine.entering([sys.executable, "-S", "-c", connect]), capture_output=True)
    return done.returncode == 0


class listening:
    """Something that accepts connections on a machine."""

    def __init__(self, machine: Machine) -> None:
        command = [sys.executable, "-m", "http.server", "8000", "--bind", machine.address]
        self._process = machine.start(command, {}, subprocess.DEVNULL)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
