"""A Ray cluster of several machines, a namespace each, with a store that all of them reach.

Each machine has a disk of its own (a folder) and one unit, ``ray start --block``, as a service manager would
keep it: what falls is started again by ``mend``, and nothing else is.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from support import fake_metadata
from support.cluster import TRAINER, wait_for
from support.fake_metadata import withdraw
from support.namespaces import Machine, Network, network
from support.s3_servers import S3Server, radosgw_server, rclone_server, why_no_radosgw

from orchestrator.on_ray.detection import as_environment

PORT = 6379
METADATA = "169.254.169.254"
"""Where every cloud's node finds its metadata service; here it plays AWS."""
UP_S = 120.0
OBJECT_STORE_BYTES = 80_000_000
CHAIN = Path(__file__).parent / "chain"
"""On a process's path: it trains digests instead of a model, see there."""


@dataclass(slots=True)
class Node:
    """A machine that runs Ray."""

    machine: Machine
    disk: Path
    unit: subprocess.Popen[bytes] | None = None
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """What was started here beside it."""

    @property
    def trainers(self) -> list[psutil.Process]:
        return self.machine.processes(TRAINER)

    @property
    def up(self) -> bool:
        return self.unit is not None and self.unit.poll() is None

    def power_off(self) -> None:
        """Power cut: everything killed at once, and the disk is lost with it."""
        self.machine.power_off()
        for process in (self.unit, *self.others):
            if process:
                process.wait()
        self.others.clear()
        shutil.rmtree(self.disk, ignore_errors=True)


@dataclass(slots=True)
class NetnsCluster:
    """A head and workers, started as ``profile`` says, and their store."""

    net: Network
    store: S3Server
    folder: Path
    head: Node
    workers: dict[str, Node]
    environment: Mapping[str, str]
    profile: str = ""
    generation: int = 0

    @property
    def address(self) -> str:
        return f"{self.head.machine.address}:{PORT}"

    def mend(self, profile: str) -> None:
        """Bring up whatever is down; a head with another profile, or a lost one, makes a new cluster."""
        if self.profile != profile or not self.head.up:
            for node in (self.head, *self.workers.values()):
                node.power_off()
            self.profile = profile
            self.start_head()
        self.keep_workers_up()
        self.wait_until_up()

    def start_head(self) -> None:
        self.head.power_off()
        self._start(self.head, self.head_command())
        wait_for("the head", lambda: self._alive_nodes() >= 1, 90)

    def head_command(self) -> list[str]:
        """What a service manager, or ``orchestrate supervise``, starts on the head's machine."""
        return self._ray(self.head, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")

    def start_worker(self, node: Node) -> None:
        """Start Ray on a machine on which nothing of it is left, and its cloud's metadata service."""
        node.power_off()
        self._start(node, self._ray(node, f"--address={self.address}", "--num-cpus=1"))
        withdraw(self.notice_file(node))
        service = [sys.executable, fake_metadata.__file__, "aws", METADATA, "80", str(self.notice_file(node))]
        node.others.append(node.machine.start(service, self.environment, subprocess.DEVNULL))

    def notice_file(self, node: Node) -> Path:
        """What the node's metadata service tells, see ``fake_metadata.announce``."""
        return node.disk.with_name(f"{node.machine.name}-notice.json")

    def keep_workers_up(self) -> None:
        """Start what has ended by itself again, as each machine's service manager would."""
        for node in self.workers.values():
            if not node.up:
                self.start_worker(node)

    def wait_until_up(self) -> None:
        """A worker may still find out that its head was another one, and end: it is started again."""
        wanted = 1 + len(self.workers)
        deadline = time.monotonic() + UP_S
        while not (all(node.up for node in self.workers.values()) and self._alive_nodes() == wanted):
            assert time.monotonic() < deadline, f"no {wanted} nodes after {UP_S:.0f} s; see {self.folder}"
            self.keep_workers_up()
            time.sleep(0.5)

    def node_at(self, place: str) -> Node:
        """The worker that a record names, such as ``10.77.0.3-5fd2``."""
        return next(n for n in self.workers.values() if place.startswith(f"{n.machine.address}-"))

    def orchestrate(self, *arguments: str, timeout_s: float = 180) -> str:
        """Run a command of ours on the head's machine."""
        command = self.head.machine.entering([sys.executable, "-m", "orchestrator", *arguments])
        done = subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def controller(self) -> psutil.Process | None:
        """The process of the controller actor; Ray names a process after its actor."""
        for process in self.head.machine.processes("ray::"):
            with contextlib.suppress(psutil.Error):
                if "controller" in " ".join(process.cmdline()).lower():
                    return process
        return None

    def _ray(self, node: Node, *options: str) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={node.machine.address}", "--num-gpus=0"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={node.disk / 'ray'}", *options),
        ]

    def _start(self, node: Node, command: list[str]) -> None:
        node.unit = self.start_process(node, command)

    def start_process(self, node: Node, command: list[str]) -> subprocess.Popen[bytes]:
        """Start something on a machine, with its output in a file of its own."""
        node.disk.mkdir(parents=True, exist_ok=True)
        self.generation += 1
        environment = {**self.environment, **as_environment(self.profile), "TMPDIR": str(node.disk)}
        with (self.folder / f"{node.machine.name}-{self.generation}.log").open("wb") as output:
            return node.machine.start(command, environment, output)

    def _alive_nodes(self) -> int:
        """As the GCS has it."""
        return _count_alive(self)


def _count_alive(cluster: NetnsCluster) -> int:
    from ray._raylet import GcsClient

    try:
        client = GcsClient(address=cluster.address)
        return sum(info.state == 0 for info in client.get_all_node_info(timeout=5).values())
    except Exception:  # not there yet, in as many ways as there are
        return 0


@contextlib.contextmanager
def netns_cluster(folder: Path, workers: int, *, chain: bool = True) -> Iterator[NetnsCluster]:
    """Machines and a store; nothing of them is left afterwards. Ray is started by ``mend``.

    ``chain``: training processes train digests, not a model.

    The calling thread is on the hub meanwhile, where the store is.
    """
    serve = rclone_server if why_no_radosgw() else radosgw_server
    short = Path(tempfile.mkdtemp(prefix="nn-", dir="/tmp"))  # Ray's sockets lie under it: 107 bytes at most
    (folder / "store").mkdir(parents=True)
    token = short / "token"
    token.write_text(secrets.token_hex(32))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        net = stack.enter_context(network())
        stack.enter_context(net.hub.entered())
        store = stack.enter_context(serve(folder / "store", host=net.hub.address))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
            **store.environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(short),
            "ORCHESTRATE_HOME": str(short / "home"),
            "HOME": str(short / "home"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(chain=chain),
        }
        (short / "home").mkdir()
        # This process asks the GCS too, and Ray reads these when it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **store.environment)
        nodes = {name: Node(net.add(name), short / name) for name in ("head", *_names(workers))}
        head = nodes.pop("head")
        for node in nodes.values():
            node.machine.add_address(METADATA)
        cluster = NetnsCluster(net, store, folder, head, nodes, environment)
        try:
            yield cluster
        finally:
            for node in (head, *nodes.values()):
                node.power_off()


def python_path(*, chain: bool) -> str:
    """What this process finds, its children find."""
    known = [os.path.abspath(path) for path in sys.path if path]
    return os.pathsep.join([str(CHAIN), *known] if chain else known)


def _names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]
