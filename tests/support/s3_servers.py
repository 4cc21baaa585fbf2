"""Real S3 servers on loopback, started for a test and stopped by their process ids.

    with rclone_server(directory) as server:
        store = open_store(server.url)          # credentials: server.environment
        server.kill()                           # SIGKILL ...
        server.restart()                        # ... and up again: same port, same directory

``rclone serve s3`` is always there and ignores create-only: it plays the store that lies. Swift (``pip
install swift``) lies subtly: its create-only holds in sequence and fails a race. Ceph's ``radosgw`` keeps
create-only and writes through to the disk; it needs ``ceph-mon ceph-osd radosgw ceph-common`` and root.
rclone and radosgw also speak TLS, with a certificate that ``Tls.make`` makes.
"""

import contextlib
import datetime
import ipaddress
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.server_process import ServerProcess, answers, free_ports, running, wait_for
from support.swift import start_swift, why_no_swift

__all__ = [
    "BUCKET",
    "S3Server",
    "Tls",
    "free_ports",
    "radosgw_server",
    "rclone_server",
    "swift_server",
    "why_no_radosgw",
    "why_no_swift",
]

BUCKET = "loras"
# One pair for all servers, so that a process can use several; Swift wants a colon in the key's id.
KEY, SECRET = "tester:TESTACCESSKEY001", "testsecretkey0001"
_CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool", "ceph-authtool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A certificate for 127.0.0.1, and the authority that signed it."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> "Tls":
        """Make an authority of our own and have it sign a certificate."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        now = datetime.datetime.now(datetime.UTC)
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
        issuer, subject = (
            x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
            for name in ("test authority", "127.0.0.1")
        )
        issuer_id = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
        usage = {
            "digital_signature": True,
            "content_commitment": False,
            "key_encipherment": False,
            "data_encipherment": False,
            "key_agreement": False,
            "encipher_only": False,
            "decipher_only": False,
        }
        signed = [
            x509.CertificateBuilder()
            .issuer_name(issuer)
            .subject_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=7))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(**usage, key_cert_sign=is_authority, crl_sign=is_authority), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(keys[0], hashes.SHA256())
            for name, key, is_authority in ((issuer, keys[0], True), (subject, keys[1], False))
        ]
        made = cls(
            authority=directory / "ca.pem", certificate=directory / "cert.pem", key=directory / "key.pem"
        )
        pem = serialization.Encoding.PEM
        made.authority.write_bytes(signed[0].public_bytes(pem))
        made.certificate.write_bytes(signed[1].public_bytes(pem))
        made.key.write_bytes(
            keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server with one bucket."""

    endpoint: str
    environment: Mapping[str, str]
    """What a process needs in its environment to use the server, beside ``url``."""
    processes: tuple[ServerProcess, ...]
    secure_endpoint: str | None = None
    """The same over TLS, where the server has both."""
    bucket: str = BUCKET

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.processes)

    @property
    def url(self) -> str:
        """For ``open_store``."""
        return self.url_of("")

    def url_of(self, prefix: str) -> str:
        """For ``open_store``, with a prefix of its own."""
        path = f"/{prefix}" if prefix else ""
        return f"s3://{self.bucket}{path}?endpoint={self.endpoint}&region=us-east-1"

    def over_tls(self) -> "S3Server":
        assert self.secure_endpoint is not None
        return replace(self, endpoint=self.secure_endpoint)

    def kill(self) -> None:
        """SIGKILL everything that the server consists of, at once."""
        for process in self.processes:
            process.kill()

    def restart(self, timeout_s: float = 90) -> None:
        """Start it again after ``kill``, on the same port and directory, and wait until it answers."""
        for process in self.processes:
            process.start()
        authority = self.environment.get("AWS_CA_BUNDLE")
        wait_for(lambda: _serves(self.endpoint, authority), timeout_s, self.processes, self.processes[-1].log)


def why_no_radosgw() -> str | None:
    """Say why radosgw cannot be started here, or None if it can."""
    missing = [program for program in _CEPH_PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install ceph-mon ceph-osd radosgw ceph-common"
    return None if os.geteuid() == 0 else "radosgw's test cluster is started as root only"


@contextlib.contextmanager
def rclone_server(directory: Path, tls: Tls | None = None, *, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Serve ``directory/buckets`` by ``rclone serve s3``: over TLS only, if there is a certificate."""
    (directory / "buckets" / BUCKET).mkdir(parents=True)
    port = free_ports(1)[0]
    program = Path(sys.executable).with_name("rclone")
    command = [
        str(program if program.exists() else "rclone"),
        *("serve", "s3", "--addr", f"{host}:{port}", "--auth-key", f"{KEY},{SECRET}"),
        *(("--cert", str(tls.certificate), "--key", str(tls.key)) if tls else ()),
        str(directory / "buckets"),
    ]
    endpoint = f"{'https' if tls else 'http'}://{host}:{port}"
    with running(command, directory / "rclone.log", {"RCLONE_CONFIG": "/dev/null"}) as server:
        wait_for(lambda: answers(endpoint), 20, [server], server.log)
        yield S3Server(endpoint=endpoint, environment=_environment(tls), processes=(server,))


@contextlib.contextmanager
def swift_server(directory: Path) -> Iterator[S3Server]:
    """Run Swift with its S3 interface: create-only holds in sequence, and not under a race."""
    with contextlib.ExitStack() as stack:
        endpoint, processes = start_swift(directory, KEY, SECRET, stack)
        _create_bucket(endpoint)
        yield S3Server(endpoint=endpoint, environment=_environment(None), processes=tuple(processes))


@contextlib.contextmanager
def radosgw_server(directory: Path, tls: Tls | None = None, *, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Run one monitor, one OSD and one gateway in ``directory``; with a certificate, also over TLS.

    ``host``: the gateway's own address; the rest stays on loopback.
    """
    # A path of a unix socket is at most 107 bytes long, which directories of tests exceed.
    sockets = Path("/tmp") / f"ceph-{uuid.uuid4().hex[:8]}"
    sockets.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            cluster = _started(directory, sockets, tls, host, stack)
            cluster.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
                        f"--access-key={KEY}", f"--secret-key={SECRET}")  # fmt: skip
            _create_bucket(cluster.endpoint)
            yield S3Server(
                endpoint=cluster.endpoint,
                environment=_environment(tls),
                processes=tuple(cluster.processes),
                secure_endpoint=cluster.secure_endpoint,
            )
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def _started(
    directory: Path, sockets: Path, tls: Tls | None, host: str, stack: contextlib.ExitStack
) -> "_Ceph":
    """Start a cluster; once more, on other ports, if somebody took one between look and use."""
    try:
        with contextlib.ExitStack() as first:
            cluster = _Ceph(directory / "first", sockets, tls, host)
            cluster.start(first)
            stack.enter_context(first.pop_all())
            return cluster
    except RuntimeError:
        cluster = _Ceph(directory / "second", sockets, tls, host)
        cluster.start(stack)
        return cluster


class _Ceph:
    """The smallest cluster that serves S3, on loopback, without authentication between its parts."""

    def __init__(self, directory: Path, sockets: Path, tls: Tls | None, host: str) -> None:
        self._directory = directory
        self._conf = directory / "ceph.conf"
        self._fsid = str(uuid.uuid4())
        self._v2_port, self._v1_port, plain_port, secure_port = free_ports(4)
        self.endpoint = f"http://{host}:{plain_port}"
        self.secure_endpoint = f"https://127.0.0.1:{secure_port}" if tls else None
        self.processes: list[ServerProcess] = []
        frontend = f"beast endpoint={host}:{plain_port}"
        if tls:
            frontend += (
                f" ssl_endpoint=127.0.0.1:{secure_port}"
                f" ssl_certificate={tls.certificate} ssl_private_key={tls.key}"
            )
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
# A change waits for no others. Most steps of a start are changes: it takes half as long.
paxos propose interval = 0.05
paxos min wait = 0.01
mon data = {directory}/mon/a

[osd]
osd data = {directory}/osd/0
osd objectstore = bluestore
bluestore block size = 12884901888
osd memory target = 939524096
osd mclock skip benchmark = true
osd class load list = *
osd class default list = *

[client]
ms mon client mode = crc

[client.rgw]
ms mon client mode = crc
rgw data = {directory}/rgw
rgw frontends = {frontend}
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

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the three daemons, and wait until the gateway answers."""
        monmap = self._directory / "monmap"
        self.run("monmaptool", "--create", "--clobber", "--fsid", self._fsid, "--addv", "a",
                 f"[v2:127.0.0.1:{self._v2_port},v1:127.0.0.1:{self._v1_port}]", str(monmap))  # fmt: skip
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monmap))
        self._daemon(stack, "ceph-mon", "-i", "a")
        (self._directory / "osd" / "0").mkdir()
        osd_id = str(uuid.uuid4())
        self._until_ok("ceph", "--connect-timeout", "2", "osd", "new", osd_id)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._daemon(stack, "ceph-osd", "-i", "0")
        wait_for(
            lambda: '"num_up_osds":1' in self.run("ceph", "osd", "stat", "-f", "json").replace(" ", ""),
            60, (), self._directory / "log" / "osd.0.log")  # fmt: skip
        gateway = self._daemon(stack, "radosgw", "-n", "client.rgw")
        wait_for(lambda: answers(self.endpoint), 90, [gateway], gateway.log)

    def _daemon(self, stack: contextlib.ExitStack, program: str, *arguments: str) -> ServerProcess:
        log = self._directory / "log" / f"{program}.out"
        process = stack.enter_context(running([program, "-c", str(self._conf), "-f", *arguments], log))
        self.processes.append(process)
        return process

    def _until_ok(self, *command: str) -> None:
        def succeeds() -> bool:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.run(*command)
                return True
            return False

        wait_for(succeeds, 60, (), self._directory / "log" / "mon.a.log")


def _client(endpoint: str, authority: str | None = None) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session(KEY, SECRET, region_name="us-east-1").client(
        "s3",
        endpoint_url=endpoint,
        verify=authority,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def _create_bucket(endpoint: str) -> None:
    _client(endpoint).create_bucket(Bucket=BUCKET)


def _serves(endpoint: str, authority: str | None) -> bool:
    """Whether the bucket is there, not only the gateway before it."""
    try:
        _client(endpoint, authority).list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    except Exception:
        return False
    return True


def _environment(tls: Tls | None) -> dict[str, str]:
    pair = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    return {**pair, "AWS_CA_BUNDLE": str(tls.authority)} if tls else pair
