"""Machines of a small network on this one: with network and processes of its own each, on one bridge.

    with network() as net, net.hub.entered():
        machine = net.add("n1")
        machine.run(["some", "command"])
        machine.unplug()

Nothing of it touches the network of the machine itself. The hub holds the bridge, and whatever all machines
reach; the test enters it to reach them. Names hold the id of the process that made them, so that what a test
that was killed left behind is removed by the next one.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

PREFIX = "orchnet"
NETWORK = "10.77.0"
HUB_ADDRESS = f"{NETWORK}.1"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_INIT = "sleep infinity & wait"
START_S = 20.0
_NUMBERS = itertools.count()
"""Of this process's networks: a test may make one while another is up."""
_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, None)


def why_no_namespaces() -> str | None:
    """Say why networks cannot be made here, or None if they can."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if missing := [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]:
        return f"{', '.join(missing)} not installed: apt-get install iproute2 util-linux"
    name = f"{PREFIX}-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespace with a bridge can be made here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


@dataclass(slots=True)
class Machine:
    """One machine, and what runs on it: it sees no process but its own."""

    name: str
    address: str
    namespace: str
    hub: str | None
    """The namespace that holds the other end of its cable; None for the hub itself."""
    _power: subprocess.Popen[bytes] | None = None
    """Ends with the machine's first process."""

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        """Start a process on this machine, in a session of its own."""
        return subprocess.Popen(
            self.entering(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )

    def entering(self, command: Sequence[str]) -> list[str]:
        """The command as this machine's. Files are everybody's."""
        own = [f"--target={self._first_process()}", "--net", "--pid", "--mount"]
        return ["nsenter", *own, f"--wd={Path.cwd()}", *command]

    def _first_process(self) -> int:
        """The id of what adopts and reaps the orphans of this machine, which is powered on if need be."""
        if self._power is None or self._power.poll() is not None:
            new = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", _INIT]
            self._power = subprocess.Popen(
                ["nsenter", f"--net={_NAMESPACES / self.namespace}", *new],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self._power.pid).children():
                    if child.cmdline()[-1:] == [_INIT]:  # its /proc is there
                        return int(child.pid)
            time.sleep(0.01)
        raise AssertionError(f"{self.name} does not start")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts meanwhile, is on that machine's network."""
        with open("/proc/thread-self/ns/net") as home, (_NAMESPACES / self.namespace).open() as there:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def unplug(self) -> None:
        """Pull the cable: nothing gets through, and nobody is told."""
        _ip("-n", str(self.hub), "link", "set", self.name, "down")

    def plug_in(self) -> None:
        _ip("-n", str(self.hub), "link", "set", self.name, "up")

    def lose_way_to(self, other: "Machine") -> None:
        """Nothing goes to the other machine, so nothing comes back; the way to all others stays."""
        _ip("-n", self.namespace, "route", "replace", "blackhole", other.address)

    def find_way_to(self, other: "Machine") -> None:
        _ip("-n", self.namespace, "route", "delete", "blackhole", other.address)

    def add_address(self, address: str) -> None:
        """Give its loopback one more address, as clouds have one for their metadata."""
        _ip("-n", self.namespace, "address", "add", f"{address}/32", "dev", "lo")

    @property
    def pids(self) -> list[int]:
        """Everything that runs on it."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]

    def processes(self, word: str) -> list[psutil.Process]:
        """What runs on it with this word in its command line."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def freeze(self) -> list[int]:
        """Stop every process on it, as a suspended machine; returns once all stand still."""
        while any(_status(pid) not in _STILL for pid in self._signal(signal.SIGSTOP)):  # or more
            time.sleep(0.005)
        return self.pids

    def thaw(self) -> None:
        """Let it go on; ``nsenter`` stops itself when what it started is stopped, maybe only now."""
        while any(_status(pid) == psutil.STATUS_STOPPED for pid in self._signal(signal.SIGCONT)):
            time.sleep(0.005)

    def power_off(self, timeout_s: float = 20.0) -> None:
        """Kill every process on it, and wait until they are gone."""
        deadline = time.monotonic() + timeout_s
        while (pids := self._signal(signal.SIGKILL)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not pids, f"{self.name} still runs {pids}"
        if self._power:
            self._power.wait()

    def _signal(self, number: signal.Signals) -> list[int]:
        """Send a signal to everything, once more to what was started meanwhile."""
        reached: set[int] = set()
        while new := [pid for pid in self.pids if pid not in reached]:
            reached.update(new)
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return sorted(reached)


class Network:
    """The hub, and the machines on it."""

    def __init__(self) -> None:
        self.prefix = f"{PREFIX}-{os.getpid()}-{next(_NUMBERS)}-"
        self.hub = Machine("hub", HUB_ADDRESS, f"{self.prefix}hub", None)
        self.machines: dict[str, Machine] = {}

    def build(self) -> None:
        hub = self.hub.namespace
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "address", "add", f"{HUB_ADDRESS}/24", "dev", "br0")
        _ip("-n", hub, "link", "set", "br0", "up")

    def add(self, name: str) -> Machine:
        """Make a machine and plug it in."""
        hub, namespace = self.hub.namespace, f"{self.prefix}{name}"
        machine = Machine(name, f"{NETWORK}.{len(self.machines) + 2}", namespace, hub)
        _ip("netns", "add", namespace)
        _ip("-n", hub, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", hub, "link", "set", name, "master", "br0", "up")
        _ip("-n", namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        self.machines[name] = machine
        return machine


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network; at the end nothing runs on it and nothing of it is left."""
    _remove_leftovers()
    net = Network()
    try:
        net.build()
        yield net
    finally:
        for machine in (net.hub, *net.machines.values()):
            machine.power_off()
        _remove(net.prefix)


def _remove_leftovers() -> None:
    """Remove what runs that were killed have left: their ids are in its names."""
    owners = {name.split("-")[1] for name in _names() if name.startswith(f"{PREFIX}-")}
    for owner in owners:
        if not psutil.pid_exists(int(owner)):
            _remove(f"{PREFIX}-{owner}-")


def _remove(prefix: str) -> None:
    for name in [name for name in _names() if name.startswith(prefix)]:
        Machine(name, "", name, None).power_off()
        _ip("netns", "delete", name)


def _status(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return None


def _names() -> list[str]:
    return [path.name for path in _NAMESPACES.iterdir()] if _NAMESPACES.is_dir() else []


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _set_namespace(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
