"""A Ray cluster on this machine that outlives the command that needed it.

``python -m orchestrator.on_ray.local_ray HOME NODES CPUS`` hosts a head and worker nodes on loopback, with
token authentication, writes ``HOME/local-ray.json`` once they are up, and ends, with everything it started,
on SIGTERM or when no controller has been left for a while. ``ray stop`` would end every Ray process of the
machine, so nothing here uses it.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from . import detection

JOB = "_ray_internal_job_actor_"
"""How Ray names the actor that watches over a submitted job."""

IDLE_S = 60.0
"""The host ends after this long without a controller."""

START_TIMEOUT_S = 120.0

KNOCK_S = 3.0
"""So long a cluster's port has to answer at all."""

HEAR_S = 20.0
"""So long something that takes connections has to say a first word."""

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How every gRPC client begins, with empty settings; a server answers with its own, before any token."""

LOOPBACK = "127.0.0.1"
"""Ray binds every port to loopback only if this is its node's address."""

_started: dict[int, subprocess.Popen[bytes]] = {}
"""Hosts that this process started, by pid: kept so that it can reap them."""


class Deaf(ConnectionError):
    """Something takes connections there, and does nothing, as a stopped process: Ray would wait for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """A running local cluster, as its host describes it."""

    address: str
    host_pid: int
    raylet_pids: dict[str, int]
    """By node name."""
    dashboard: str
    """Host and port of Ray's dashboard; it asks for the token."""

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.host_pid, 0)
        except (ProcessLookupError, PermissionError):  # after a reboot the pid is somebody else's
            return False
        return "orchestrator.on_ray.local_ray" in _command_line(self.host_pid)


def home() -> Path:
    """Where the local cluster's address and token are kept: ``$ORCHESTRATE_HOME`` or ``~/.orchestrate``."""
    return Path(os.environ.get("ORCHESTRATE_HOME") or Path.home() / ".orchestrate")


def find() -> LocalRay | None:
    """Return the local cluster that is running, if there is one."""
    try:
        cluster = LocalRay(**json.loads((home() / "local-ray.json").read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None
    return cluster if cluster.alive else None


def find_or_start() -> LocalRay:
    """Return the local cluster, started if there is none; of two commands at once, one starts it."""
    home().mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return find() or start()


def started_here(cluster: LocalRay) -> bool:
    """Whether this very process started the cluster's host."""
    return cluster.host_pid in _started


def meant(address: str) -> str:
    """Return the address that ``auto`` stands for where Ray says so: in the processes that it starts itself,
    as a job's. On loopback we connect in our own way, so this must be known first."""
    return os.environ.get("RAY_ADDRESS", address) if address == "auto" else address


def is_local(address: str) -> bool:
    """Whether an address is one of this machine's loopback interface."""
    return address.startswith((f"{LOOPBACK}:", "localhost:"))


def start(nodes: int = 1, cpus: int | None = None) -> LocalRay:
    """Start a local cluster and wait until it is up.

    Args:
        nodes: Worker nodes beside the head, which runs nothing but the controller.
        cpus: CPUs of each; by default all of the machine's, shared out.

    Raises:
        RuntimeError: It did not come up; the message names its log.
    """
    detection.system_config()  # the host would fail at it where nobody sees
    here = home()
    here.mkdir(parents=True, exist_ok=True, mode=0o700)
    (here / "local-ray.json").unlink(missing_ok=True)
    each = cpus or max(1, (os.cpu_count() or 1) // nodes)
    log = here / "local-ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.on_ray.local_ray", str(here), str(nodes), str(each)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _started[process.pid] = process
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if cluster := find():
            return cluster
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    raise RuntimeError(f"the local Ray cluster did not come up; its log is {log}")


def stop(cluster: LocalRay, timeout_s: float = 30.0) -> None:
    """End a local cluster and wait until its host is gone. A connection of this process to it ends first."""
    disconnect()
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.host_pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while cluster.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    if host := _started.pop(cluster.host_pid, None):
        host.wait(timeout=timeout_s)


def add_node(cluster: LocalRay, timeout_s: float = 60.0) -> LocalRay:
    """Give a local cluster one more worker node, as a cloud replaces a lost one.

    Raises:
        RuntimeError: It did not come up.
    """
    os.kill(cluster.host_pid, signal.SIGUSR1)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        known = find()
        if known and known.raylet_pids.keys() != cluster.raylet_pids.keys():
            return known
        time.sleep(0.05)
    raise RuntimeError(f"no new node came up within {timeout_s:.0f} s")


def kill_node(cluster: LocalRay, name: str) -> int:
    """Kill a node as a power cut would: SIGKILL to its raylet and to everything that runs under it.

    Returns:
        How many processes were killed.
    """
    import psutil

    try:
        raylet = psutil.Process(cluster.raylet_pids[name])
    except psutil.NoSuchProcess:
        return 0
    doomed = [raylet, *raylet.children(recursive=True)]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(doomed)


def answers(address: str) -> bool:
    """Whether anything listens at the address; True for one that only Ray can look up."""
    try:
        line = _knock(address)
    except ConnectionError:
        return False
    if line:
        line.close()
    return True


def connect(address: str) -> None:
    """Connect this process to the cluster at ``address``, with its token if it is the local one.

    Raises:
        ConnectionError: Nothing listens there, or what does says nothing (``Deaf``). Ray would try for
            minutes before it said so.
    """
    _hear(address)
    if is_local(address):
        authenticate(home())  # to no other: the token would go to a stranger
    import ray

    if is_local(address):
        # Ray would replace the loopback address by one that other machines reach, at which nothing listens;
        # this is the switch by which it does not on macOS.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(address=address, namespace="orchestrate", log_to_driver=False, logging_level="ERROR")
    # Ray also prints pages about each lost node, to stdout, which is for data. We say it in our own words.
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None


def _knock(address: str) -> socket.socket | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return None  # "auto", for example: Ray knows where that is
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S)
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there: {error}") from error


def _hear(address: str) -> None:
    """Make sure that what listens there reacts at all; whether it is Ray's, Ray says better."""
    if (line := _knock(address)) is None:
        return
    with line:
        line.settimeout(HEAR_S)
        try:
            line.sendall(HELLO)
            line.recv(1)
        except TimeoutError as error:
            raise Deaf(f"something takes connections and says nothing for {HEAR_S:.0f} s") from error
        except OSError:
            pass  # a refusal is an answer


def disconnect() -> None:
    """End this process's connection: Ray ends a process whose cluster is gone, a minute later and unsaid."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def authenticate(folder: Path) -> None:
    """Use the local cluster's token in this process, unless the environment names another way.

    Ray reads these variables when it is imported, so this must come first.
    """
    token = folder / "ray-token"
    if "RAY_AUTH_MODE" not in os.environ and token.exists():
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _free_port(wanted: int) -> int:
    """Return ``wanted`` (Ray's own choice for its dashboard) if it is free on loopback, else one that is."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((LOOPBACK, port)) as server:
            return int(server.getsockname()[1])
    raise OSError("no port is free on the loopback interface")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one head of this user start at a time: two would both find the dashboard's port free.

    Who hangs while starting, or took the file's name from us, holds nobody up for long.
    """
    path = Path(tempfile.gettempdir()) / f"orchestrate-{os.getuid()}.starting"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + START_TIMEOUT_S / 2
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _make_token(path: Path) -> None:
    """Make a token that only we can read, unless there is one; it appears whole or not at all."""
    if path.exists():
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable by us alone
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.replace(temporary, path)


def _command_line(pid: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())
    return ""


class _Host:
    """The process that holds the cluster's processes."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self._folder = folder
        self._stopping = False
        if "RAY_AUTH_MODE" not in os.environ:
            _make_token(folder / "ray-token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as in ``connect``, for Ray's jobs
        authenticate(folder)
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        self._wanted = nodes
        self._raylets: dict[str, int] = {}
        loopback = {"node_ip_address": LOOPBACK}
        with one_at_a_time():
            self._cluster: Any = Cluster(
                initialize_head=True,
                head_node_args={
                    **loopback,
                    "num_cpus": 0,
                    "num_gpus": 0,
                    "include_dashboard": True,
                    "dashboard_host": LOOPBACK,
                    "dashboard_port": _free_port(8265),
                    "_system_config": detection.system_config(),
                },
            )
        self._gpus = {} if nodes == 1 else {"num_gpus": 0}  # one worker node sees the machine's GPUs
        while len(self._raylets) < self._wanted:
            self._add_node()
        self._cluster.wait_for_nodes(timeout=60)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_more)

    def serve(self) -> None:
        """Publish the address, then wait for a signal or for idleness."""
        self._publish()
        connect(self._cluster.address)
        busy_at = time.monotonic()
        while not self._stopping and time.monotonic() - busy_at < IDLE_S:
            if self._controllers():
                busy_at = time.monotonic()
            while len(self._raylets) < self._wanted:
                self._add_node()
                self._publish()
            time.sleep(0.2)

    def close(self) -> None:
        """End every process of the cluster, exactly those that this host started and their descendants."""
        import psutil

        mine = psutil.Process().children(recursive=True)
        (self._folder / "local-ray.json").unlink(missing_ok=True)
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(mine, timeout=10)

    def _add_node(self) -> None:
        name = f"node-{len(self._raylets) + 1}"
        node = self._cluster.add_node(
            node_ip_address=LOOPBACK, num_cpus=self._cpus, node_name=name, wait=False, **self._gpus
        )
        self._raylets[name] = node.all_processes["raylet"][0].process.pid

    def _publish(self) -> None:
        described = LocalRay(
            address=self._cluster.address,
            host_pid=os.getpid(),
            raylet_pids=self._raylets,
            dashboard=str(self._cluster.webui_url or ""),
        )
        temporary = self._folder / "local-ray.tmp"
        temporary.write_text(json.dumps(asdict(described)))
        temporary.replace(self._folder / "local-ray.json")

    def _controllers(self) -> bool:
        import ray

        try:
            names = ray.util.list_named_actors(all_namespaces=True)
        except ray.exceptions.RayError:
            return False
        # A job that was submitted here may be about to start one.
        return any(str(a["name"]).endswith("/controller") or str(a["name"]).startswith(JOB) for a in names)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _on_more(self, number: int, frame: FrameType | None) -> None:
        self._wanted += 1


def main() -> None:
    folder, nodes, cpus = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    host = _Host(folder, nodes, cpus)
    try:
        host.serve()
    finally:
        host.close()
        os._exit(0)  # Ray's exit hooks would wait for the cluster that was just ended


if __name__ == "__main__":
    main()
