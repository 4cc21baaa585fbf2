"""Moving bytes to and from S3 servers: ours beside boto3, obstore and one plain request; slow uplinks; lag.

    python benchmarks/object_storage.py [--mb 200] [--repeats 5] [--save]

Loopback: real servers (rclone always, radosgw where it is installed), which share this machine's cores with
the clients; all take turns. ``raw`` is one PUT or GET of a presigned url by ``http.client``, which hashes
nothing. Peak memory is that of a process of its own for each transfer, imports included.

Uplinks are shaped by the kernel's token bucket (``tc tbf``) in a network namespace, which takes root and
iproute2; elsewhere by the one of the tests' proxy. ``lag`` is the age of the newest commit, sampled while
checkpoints are made twice as fast as the uplink carries them: once newest first, as the replicator does it,
and once each in turn.

Not named ``storage.py``: from this directory that would hide the package.
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

import boto3  # noqa: E402
import click  # noqa: E402
from botocore.config import Config  # noqa: E402
from support.fault_proxy import FaultProxy  # noqa: E402
from support.s3_servers import S3Server, radosgw_server, rclone_server, why_no_radosgw  # noqa: E402

from storage.object_store import ObjectStore  # noqa: E402
from storage.s3.store import S3Store  # noqa: E402
from storage.url import open_store  # noqa: E402

UPLINKS_MBIT = (5, 10, 20, 100)
SHAPED_S = 20.0
LAG_S = 40.0
CHUNK_BYTES = 1 << 20
WAYS = ("ours", "boto3", "obstore", "raw")

Transfer = Callable[[str, Path], None]


@click.command()
@click.option("--mb", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--repeats", type=click.IntRange(min=5), default=5, show_default=True)
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
@click.option("--only", type=click.Choice(["loopback", "uplinks", "lag"]), help="One part of it.")
def main(mb: int, repeats: int, save: bool, only: str | None) -> None:
    from benchmarks.harness import conclude

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        if only in (None, "loopback"):
            figures["loopback"] = {
                kind: _loopback(kind, server, mb * 10**6, repeats, folder)
                for kind, server in _servers(folder)
            }
        if only in (None, "uplinks"):
            figures["uplinks"] = _uplinks(folder / "uplinks")
        if only in (None, "lag"):
            figures["lag"] = _lag(folder / "lag")
    conclude("object_storage", figures, save=save)


def _servers(folder: Path) -> Iterator[tuple[str, S3Server]]:
    with _serving(rclone_server(folder / "rclone")) as server:
        yield "rclone", server
    if reason := why_no_radosgw():
        print(f"without radosgw: {reason}", file=sys.stderr)
        return
    with _serving(radosgw_server(folder / "radosgw")) as server:
        yield "radosgw", server


@contextlib.contextmanager
def _serving(starting: contextlib.AbstractContextManager[S3Server]) -> Iterator[S3Server]:
    with starting as server:
        os.environ.update(server.environment)
        yield server


# Four ways to move one file.


def _way(name: str, endpoint: str, bucket: str) -> tuple[Transfer, Transfer]:
    """How a tool uploads and downloads."""
    return {"ours": _ours, "boto3": _boto3, "obstore": _obstore, "raw": _raw}[name](endpoint, bucket)


def _ours(endpoint: str, bucket: str) -> tuple[Transfer, Transfer]:
    store = open_store(f"s3://{bucket}?endpoint={endpoint}&region=us-east-1")
    return store.put, store.download


def _boto3(endpoint: str, bucket: str) -> tuple[Transfer, Transfer]:
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    return (
        lambda key, path: client.upload_file(str(path), bucket, key),
        lambda key, path: client.download_file(bucket, key, str(path)),
    )


def _obstore(endpoint: str, bucket: str) -> tuple[Transfer, Transfer]:
    import obstore
    from obstore.store import S3Store as TheirStore

    store = TheirStore(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def download(key: str, path: Path) -> None:
        with path.open("wb") as file:
            for chunk in obstore.get(store, key).stream(min_chunk_size=CHUNK_BYTES):
                file.write(chunk)

    return (lambda key, path: obstore.put(store, key, path) and None), download


def _raw(endpoint: str, bucket: str) -> tuple[Transfer, Transfer]:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )

    def asked(operation: str, key: str, **request: Any) -> http.client.HTTPResponse:
        url = urlsplit(client.generate_presigned_url(operation, Params={"Bucket": bucket, "Key": key}))
        connection = http.client.HTTPConnection(url.hostname or "", url.port, blocksize=CHUNK_BYTES)
        connection.request(operation[:3].upper(), f"{url.path}?{url.query}", **request)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"{operation}: {response.status}")
        return response

    def upload(key: str, path: Path) -> None:
        with path.open("rb") as file:
            length = str(path.stat().st_size)
            asked("put_object", key, body=file, headers={"Content-Length": length}).read()

    def download(key: str, path: Path) -> None:
        response = asked("get_object", key)
        with path.open("wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)

    return upload, download


def _loopback(kind: str, server: S3Server, size: int, repeats: int, folder: Path) -> dict[str, Any]:
    from benchmarks.harness import BenchmarkFailed, median, show, verdict

    source, target = folder / "source", folder / "target"
    source.write_bytes(os.urandom(size))
    rates: dict[str, list[float]] = {f"{way} {up}": [] for way in WAYS for up in ("up", "down")}
    ways = {way: _way(way, server.endpoint, server.bucket) for way in WAYS}
    for number in range(repeats + 1):
        for way, (upload, download) in ways.items():
            for direction, move, path in (("up", upload, source), ("down", download, target)):
                seconds = _timed(lambda move=move, way=way, path=path: move(way, path))
                if number:  # the first time warms up
                    rates[f"{way} {direction}"].append(size / seconds / 1e6)
        if target.read_bytes() != source.read_bytes():
            raise BenchmarkFailed(f"{way} on {kind}: what came back is not what was sent")
    memory = {f"{way} {d}": _peak_mb(way, d, server, source) for way in WAYS for d in ("up", "down")}
    figures: dict[str, Any] = {"mb": size / 1e6}
    for direction in ("up", "down"):
        of = {way: rates[f"{way} {direction}"] for way in WAYS}
        for way in WAYS:
            figures[f"{way}_{direction}_mb_s"] = median(of[way], 1)
            figures[f"{way}_{direction}_peak_mb"] = memory[f"{way} {direction}"]
        for other in WAYS[1:]:
            figures[f"{direction}_beside_{other}"] = median(
                [a / b for a, b in zip(of["ours"], of[other], strict=True)]
            )
    rows = [
        [
            way,
            *(f"{figures[f'{way}_{d}_{what}']:.0f}" for d in ("up", "down") for what in ("mb_s", "peak_mb")),
        ]
        for way in WAYS
    ]
    title = f"{size / 1e6:g} MB, {kind} on loopback, median of {repeats}"
    show(title, ["", "up MB/s", "peak MB", "down MB/s", "peak MB"], rows)
    goals = {"up_beside_raw": 0.8, "up_beside_boto3": 1.0, "down_beside_raw": 0.8}
    print("; ".join(f"{name} {verdict(figures[name], goal, at_least=True)}" for name, goal in goals.items()))
    return figures


def _peak_mb(way: str, direction: str, server: S3Server, source: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--child", way, direction, server.endpoint, server.bucket, str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _child(way: str, direction: str, endpoint: str, bucket: str, source: str) -> None:
    """Move the file once or twice and print this process's peak memory."""
    upload, download = _way(way, endpoint, bucket)
    if direction == "up":
        upload(f"{way}-memory", Path(source))
    else:
        download(way, Path(f"{source}-{way}"))
        os.unlink(f"{source}-{way}")
    status = Path("/proc/self/status").read_text()  # a child's ru_maxrss begins with its parent's
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


# Slow uplinks.


def _uplinks(folder: Path) -> dict[str, Any]:
    """Upload over each uplink, in a network namespace of this benchmark's own where that is possible."""
    from benchmarks.harness import show

    folder.mkdir()
    by = "tc tbf" if _can_shape() else "the tests' proxy"
    if by == "tc tbf":
        command = [sys.executable, __file__, "--shaped", str(folder)]
        done = subprocess.run(["unshare", "--net", *command], stdout=subprocess.PIPE, text=True, check=True)
        used = json.loads(done.stdout)
    else:
        used = _through_a_proxy(folder)
    rows = [[f"{mbit} Mbit/s", f"{share:.3f}"] for mbit, share in zip(UPLINKS_MBIT, used, strict=True)]
    title = f"uplinks shaped by {by}, {SHAPED_S:g} s of bytes each"
    show(title, ["", "used, goal at least 0.95"], rows)
    return {"shaped_by": by, "used": dict(zip(map(str, UPLINKS_MBIT), used, strict=True))}


def _can_shape() -> bool:
    """Whether this process may make a network namespace, and the kernel knows the token bucket filter."""
    try:
        done = subprocess.run(["unshare", "--net", "sh", "-c", _shape(5)], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _shape(mbit: int) -> str:
    """A shell line that limits the namespace's only way, loopback: both directions, but answers are short.

    Packets are smaller than loopback's usual 64 kB, so that a burst of several is still short.
    """
    bucket = f"rate {mbit}mbit burst 64kb latency 400ms"
    return f"ip link set lo up mtu 16384 && tc qdisc replace dev lo root tbf {bucket}"


def _shaped(folder: str) -> None:
    """Print the share of each rate that an upload used. Runs in a network namespace of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    used = []
    with _serving(rclone_server(Path(folder) / "rclone")) as server:
        for mbit in UPLINKS_MBIT:
            store = open_store(server.url_of(f"uplink-{mbit}"))
            subprocess.run(["sh", "-c", _shape(mbit)], check=True)
            used.append(_used(store, mbit, Path(folder)))
    print(json.dumps(used))


def _through_a_proxy(folder: Path) -> list[float]:
    used = []
    with _serving(rclone_server(folder / "rclone")) as server:
        for mbit in UPLINKS_MBIT:
            with FaultProxy(server.endpoint, uplink_bytes_per_s=mbit * 1e6 / 8) as proxy:
                url = server.url_of(f"uplink-{mbit}").replace(server.endpoint, proxy.endpoint)
                used.append(_used(open_store(url), mbit, folder))
    return used


def _used(store: ObjectStore, mbit: int, folder: Path) -> float:
    source, size = folder / "file", round(mbit * 1e6 / 8 * SHAPED_S)
    source.write_bytes(os.urandom(size))
    seconds = _timed(lambda: store.put("file", source))
    return round(SHAPED_S / seconds, 3)


# How old the newest commit is.


def _lag(folder: Path) -> dict[str, Any]:
    from benchmarks.harness import show

    figures: dict[str, Any] = {"mbit": 10, "every_s": 2.0, "checkpoint_s": 4.0}
    folder.mkdir()
    with _serving(rclone_server(folder / "rclone")) as server:
        for name, skip in (("skipping", True), ("each_in_turn", False)):
            with FaultProxy(server.endpoint, uplink_bytes_per_s=10e6 / 8) as proxy:
                url = server.url_of(name).replace(server.endpoint, proxy.endpoint)
                store = open_store(url, check_then_put=True)
                assert isinstance(store, S3Store)
                ages = _ages(store, folder / name, every_s=2.0, size=round(10e6 / 8 * 4), skip=skip)
            figures[name] = {
                "age_s_at_quarters": [round(ages[len(ages) * n // 4 - 1], 1) for n in range(1, 5)],
                "oldest_s": round(max(ages), 1),
            }
    rows = [
        [
            name,
            *(f"{age:.1f}" for age in figures[name]["age_s_at_quarters"]),
            f"{figures[name]['oldest_s']:.1f}",
        ]
        for name in ("skipping", "each_in_turn")
    ]
    columns = ["10 Mbit/s, 5 MB every 2 s", *(f"after {LAG_S * n / 4:g} s" for n in range(1, 5)), "oldest"]
    show("age of the newest commit, s", columns, rows)
    return figures


def _ages(store: S3Store, folder: Path, *, every_s: float, size: int, skip: bool) -> list[float]:
    """Make checkpoints and publish them; return samples of the newest commit's age, once there is one."""
    from support.runs import RUN, claimed, incarnation, write_checkpoint

    from storage.checkpoints import CheckpointStore
    from storage.local import LocalCheckpoint, complete_checkpoints
    from storage.log import run_log
    from storage.replicator import Replicator

    log = run_log(store, RUN)
    log.append(claimed(1))
    checkpoints = CheckpointStore(store, RUN, log)
    made: dict[int, float] = {}
    newest = threading.Event(), [0]

    def publish(checkpoint: LocalCheckpoint) -> None:
        checkpoints.publish(checkpoint, 1, incarnation(1))
        newest[1][0] = checkpoint.step
        newest[0].set()

    replicator = Replicator(folder, publish, on_fenced=lambda error: None, rescan_s=0.2)
    over = threading.Event()

    def each_in_turn() -> None:
        sent = 0
        while not over.is_set():
            for checkpoint in reversed(complete_checkpoints(folder)):
                if checkpoint.step > sent and not over.is_set():
                    publish(checkpoint)
                    sent = checkpoint.step
            over.wait(0.05)

    folder.mkdir()
    thread = threading.Thread(target=each_in_turn, daemon=True)
    (replicator.start if skip else thread.start)()
    ages: list[float] = []
    began = time.monotonic()
    step = 0
    while (now := time.monotonic() - began) < LAG_S:
        if now >= step * every_s:
            step += 1
            made[step] = now
            write_checkpoint(folder, step, files={"adapter.safetensors": os.urandom(size)})
        if newest[0].is_set():
            ages.append(now - made[newest[1][0]])
        time.sleep(0.1)
    over.set()
    if skip:
        replicator.drain(30)
        replicator.stop()
    else:
        thread.join(30)
    return ages


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--shaped"]:
        _shaped(*sys.argv[2:])
    else:
        from benchmarks.harness import run

        run(lambda: main(standalone_mode=False))
