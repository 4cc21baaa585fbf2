"""Real S3 servers on loopback, started for a test and stopped by their process ids.

    with rclone_server(directory) as server:
        store = open_store(server.url)          # credentials: server.environment

``rclone serve s3`` is always there and ignores create-only: it plays the store that lies. Ceph's ``radosgw``
keeps create-only and writes through to the disk; it needs ``ceph-mon ceph-osd radosgw ceph-common`` and root.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "loras"
_CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool", "ceph-authtool")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server with one bucket."""

    endpoint: str
    environment: Mapping[str, str]
    """What a process needs in its environment to use the server, beside ``url``."""
    bucket: str = BUCKET
    pids: tuple[int, ...] = field(default=())

    @property
    def url(self) -> str:
        """For ``open_store``."""
        return self.url_of("")

    def url_of(self, prefix: str) -> str:
        """For ``open_store``, with a prefix of its own."""
        path = f"/{prefix}" if prefix else ""
        return f"s3://{self.bucket}{path}?endpoint={self.endpoint}&region=us-east-1"


def why_no_radosgw() -> str | None:
    """Say why radosgw cannot be started here, or None if it can."""
    missing = [program for program in _CEPH_PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install ceph-mon ceph-osd radosgw ceph-common"
    return None if os.geteuid() == 0 else "radosgw's test cluster is started as root only"


@contextlib.contextmanager
def rclone_server(directory: Path) -> Iterator[S3Server]:
    """Serve ``directory/buckets`` by ``rclone serve s3``."""
    (directory / "buckets" / BUCKET).mkdir(parents=True)
    key, secret, port = "TESTACCESSKEY001", "testsecretkey0001", free_ports(1)[0]
    program = Path(sys.executable).with_name("rclone")
    command = [
        str(program if program.exists() else "rclone"),
        *("serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"),
        str(directory / "buckets"),
    ]
    endpoint = f"http://127.0.0.1:{port}"
    with _process(command, directory / "rclone.log", {"RCLONE_CONFIG": "/dev/null"}) as server:
        _wait_for(lambda: _answers(endpoint), 20, [server], directory / "rclone.log")
        yield S3Server(endpoint=endpoint, environment=_environment(key, secret), pids=(server.pid,))


@contextlib.contextmanager
def radosgw_server(directory: Path) -> Iterator[S3Server]:
    """Run one monitor, one OSD and one gateway in ``directory``."""
    key, secret = "TESTACCESSKEY001", "testsecretkey0001"
    # A path of a unix socket is at most 107 bytes long, which directories of tests exceed.
    sockets = Path("/tmp") / f"ceph-{uuid.uuid4().hex[:8]}"
    sockets.mkdir()
    try:
        with contextlib.ExitStack() as running:
            cluster, gateway = _started(directory, sockets, running)
            cluster.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
                        f"--access-key={key}", f"--secret-key={secret}")  # fmt: skip
            _create_bucket(gateway, key, secret)
            yield S3Server(endpoint=gateway, environment=_environment(key, secret), pids=tuple(cluster.pids))
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def _started(directory: Path, sockets: Path, running: contextlib.ExitStack) -> tuple["_Ceph", str]:
    """Start a cluster; once more, on other ports, if somebody took one between look and use."""
    try:
        with contextlib.ExitStack() as first:
            cluster = _Ceph(directory / "first", sockets)
            gateway = cluster.start(first)
            running.enter_context(first.pop_all())
            return cluster, gateway
    except RuntimeError:
        cluster = _Ceph(directory / "second", sockets)
        return cluster, cluster.start(running)


class _Ceph:
    """The smallest cluster that serves S3, on loopback, without authentication between its parts."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self._directory = directory
        self._conf = directory / "ceph.conf"
        self._fsid = str(uuid.uuid4())
        self._v2_port, self._v1_port, self._rgw_port = free_ports(3)
        self.pids: list[int] = []
        for name in ("mon", "osd", "rgw", "log"):
            (directory / name).mkdir(parents=True)
        self._conf.write_text(
            f"""[global]
fsid = {self._fsid}
mon host = [v2:127.0.0.1:{self._v2_port},v1:127.0.0.1:{self._v1_port}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
auth supported = none
run dir = {sockets}
admin socket = {sockets}/$name.$pid.asok
log file = {directory}/log/$name.log
pid file =
crash dir = {directory}/log
keyring = {directory}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
osd crush chooseleaf type = 0
mon data avail crit = 1
mon data avail warn = 1
mon osd full ratio = 0.99
mon osd nearfull ratio = 0.98
mon data = {directory}/mon/a

[osd]
osd data = {directory}/osd/0
osd objectstore = bluestore
bluestore block size = 12884901888
osd memory target = 939524096
osd class load list = *
osd class default list = *

[client]
ms mon client mode = crc

[client.rgw]
ms mon client mode = crc
rgw data = {directory}/rgw
rgw frontends = beast endpoint=127.0.0.1:{self._rgw_port}
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw enable usage log = false
rgw enable ops log = false
rgw thread pool size = 64
"""
        )
        (directory / "keyring").write_text("")

    def run(self, program: str, *arguments: str) -> str:
        """Run a command of the cluster to its end and return its output."""
        done = subprocess.run(
            [program, "-c", str(self._conf), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self._directory,
        )
        if done.returncode:
            raise RuntimeError(
                f"{program} {' '.join(arguments)}: exit {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout

    def start(self, running: contextlib.ExitStack) -> str:
        """Start the three daemons; return the gateway's url once it answers."""
        monmap = self._directory / "monmap"
        self.run("monmaptool", "--create", "--clobber", "--fsid", self._fsid, "--addv", "a",
                 f"[v2:127.0.0.1:{self._v2_port},v1:127.0.0.1:{self._v1_port}]", str(monmap))  # fmt: skip
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
        self._daemon(running, "ceph-mon", "-i", "a")
        (self._directory / "osd" / "0").mkdir()
        osd_id = str(uuid.uuid4())
        self._until_ok("ceph", "--connect-timeout", "2", "osd", "new", osd_id)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._daemon(running, "ceph-osd", "-i", "0")
        _wait_for(
            lambda: '"num_up_osds":1' in self.run("ceph", "osd", "stat", "-f", "json").replace(" ", ""),
            60, (), self._directory / "log" / "osd.0.log")  # fmt: skip
        gateway = self._daemon(running, "radosgw", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{self._rgw_port}"
        _wait_for(lambda: _answers(endpoint), 90, [gateway], self._directory / "log" / "radosgw.out")
        return endpoint

    def _daemon(
        self, running: contextlib.ExitStack, program: str, *arguments: str
    ) -> subprocess.Popen[bytes]:
        log = self._directory / "log" / f"{program}.out"
        command = [program, "-c", str(self._conf), "-f", *arguments]
        process = running.enter_context(_process(command, log, {}))
        self.pids.append(process.pid)
        return process

    def _until_ok(self, *command: str) -> None:
        def succeeds() -> bool:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.run(*command)
                return True
            return False

        _wait_for(succeeds, 60, (), self._directory / "log" / "mon.a.log")


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server with its output in a file, and end exactly it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()  # also a refusal is an answer
    except OSError:
        return False
    return True


def _wait_for(
    ready: Callable[[], bool],
    timeout_s: float,
    processes: Sequence[subprocess.Popen[bytes]],
    log: Path,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        ended = [process.args for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{ended or log.name}: not ready after {timeout_s:g} s:\n{tail}")
        time.sleep(0.05)


def _create_bucket(endpoint: str, key: str, secret: str) -> None:
    import boto3
    from botocore.config import Config

    boto3.session.Session(key, secret, region_name="us-east-1").client(
        "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"})
    ).create_bucket(Bucket=BUCKET)


def _environment(key: str, secret: str) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_EC2_METADATA_DISABLED": "true"}
