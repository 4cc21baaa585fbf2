"""The checks of ``doctor``: each tries one thing and says what it found, or raises the store's error."""

import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import Corrupt, NotFound, StorageError
from ..object_store import ObjectStore
from ..probe import probe_anew

SKEW_WARNING_S = 30.0
SKEW_ERROR_S = 300.0
TRANSFER_SIZES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
TRANSFER_S = 10.0
"""How long a throughput measurement should take at most."""
_SMALL_PUTS = 5
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check; see ``examination.Check``."""

    said: str
    todo: str = ""
    ok: bool | None = True
    figures: Mapping[str, float] = field(default_factory=dict)


_NOT_FOR_FOLDERS = Finding("does not apply: the store is no bucket", ok=None)


class Bench:
    """What the checks share: the store, and a corner of it that is cleared at the end."""

    def __init__(
        self, store: ObjectStore, url: str, prefix: str, now: Callable[[], float], checkpoint_bytes: int
    ) -> None:
        self.store = store
        self.url = url
        self.prefix = prefix
        self.now = now
        self.checkpoint_bytes = checkpoint_bytes
        self._keys: list[str] = []

    @property
    def in_bucket(self) -> bool:
        return self.store.url.startswith("s3:")

    def fresh_key(self) -> str:
        self._keys.append(f"{self.prefix}{len(self._keys):04d}")
        return self._keys[-1]

    def clear(self) -> StorageError | None:
        """Delete what was written; return why that failed, if it did."""
        failure: StorageError | None = None
        try:
            self.store.delete(self._keys)
        except StorageError as error:
            failure = error
        try:
            self.store.abort_uploads(self.prefix)
        except StorageError as error:
            failure = failure or error
        return failure


def reach(bench: Bench) -> Finding:
    next(iter(bench.store.list(bench.prefix)), None)
    return Finding(f"{bench.store.url} answers and lists" if bench.in_bucket else bench.store.url)


def clock(bench: Bench) -> Finding:
    """Compare this machine's clock with the server's, which is told to the second."""
    if not bench.in_bucket:
        return _NOT_FOR_FOLDERS
    from ..s3.store import S3Store  # boto3 takes long to import, and a folder needs none of it

    assert isinstance(bench.store, S3Store)
    before = bench.now()
    told = bench.store.server_time()
    if told is None:
        return Finding("the server's answers carry no date", ok=None)
    ahead_s = (before + bench.now()) / 2 - told.timestamp() - 0.5
    return judged_skew(ahead_s)


def judged_skew(ahead_s: float) -> Finding:
    """Say what it means that this machine's clock is so much ahead of the server's."""
    figures = {"clock_ahead_s": round(ahead_s, 1)}
    if abs(ahead_s) <= SKEW_WARNING_S:
        return Finding("this machine's clock and the server's agree", figures=figures)
    side = "ahead of" if ahead_s > 0 else "behind"
    said = f"this machine's clock is {abs(ahead_s):.0f} s {side} the server's"
    limit = f"servers refuse requests from {SKEW_ERROR_S / 60:.0f} to 15 minutes of difference on"
    todo = f"set this machine's clock, by NTP for example: {limit}"
    return Finding(said, todo, ok=abs(ahead_s) <= SKEW_ERROR_S, figures=figures)


def write_and_read(bench: Bench) -> Finding:
    key, body = bench.fresh_key(), secrets.token_bytes(4096)
    bench.store.put(key, body)
    if bench.store.get(key) != body:
        raise Corrupt(f"{key} in {bench.store.url}: read back other bytes than were written")
    bench.store.put(key, body[::-1])
    if bench.store.get(key) != body[::-1]:
        raise Corrupt(f"{key} in {bench.store.url}: was overwritten, and the old bytes are read")
    return Finding("what is written is what is read, at once")


def list_after_write(bench: Bench) -> Finding:
    """A log is found by listing: what was written must be listed at once."""
    for _ in range(_LISTED):
        key = bench.fresh_key()
        bench.store.put(key, b"x")
        if key not in [info.key for info in bench.store.list(key)]:
            raise NotFound(f"{key} in {bench.store.url}: was written, but a listing does not show it")
    return Finding(f"{_LISTED} of {_LISTED} objects were listed as soon as they were written")


def delete(bench: Bench) -> Finding:
    key = bench.fresh_key()
    bench.store.put(key, b"x")
    bench.store.delete([key])
    if bench.store.head(key) is not None or list(bench.store.list(key)):
        raise Corrupt(f"{key} in {bench.store.url}: was deleted, but is still there")
    return Finding("objects can be deleted, and are gone at once")


def create_only(bench: Bench) -> Finding:
    probed = probe_anew(bench.store, bench.url)
    if probed.atomic:
        return Finding(f"direct: {probed.reason}; agents append to the logs themselves")
    return Finding(f"arbitrated: {probed.reason}; only a sweep's controller appends to its logs")


def multipart(bench: Bench) -> Finding:
    """Large files go in parts; what a dead writer leaves of one costs money until it is found."""
    if not bench.in_bucket:
        return _NOT_FOR_FOLDERS
    from ..s3.checks import Bucket

    bucket, whole, left = Bucket(bench.url), bench.fresh_key(), bench.fresh_key()
    body = secrets.token_bytes(64 << 10)
    bucket.upload_in_parts(whole, body)
    if bench.store.get(whole) != body:
        raise Corrupt(f"{whole} in {bench.store.url}: was uploaded in parts, and other bytes are read")
    bucket.begin_upload(left)
    listed = [info.key for info in bench.store.unfinished(left)]
    bench.store.abort_uploads(left)
    if left not in listed:
        todo = (
            "set a lifecycle rule that aborts incomplete multipart uploads after a day, if the server has any"
        )
        return Finding("works, but uploads that were never finished are not listed", todo)
    if list(bench.store.unfinished(left)):
        raise Corrupt(f"{left} in {bench.store.url}: an upload was aborted, but is still listed")
    return Finding("works; an unfinished upload was listed, and aborted")


def checksums(bench: Bench) -> Finding:
    """Say what the server does with checksums, and how we send them."""
    if not bench.in_bucket:
        return _NOT_FOR_FOLDERS
    from ..s3.checks import Bucket

    bucket = Bucket(bench.url)
    refusal = bucket.refusal_of_trailers(bench.fresh_key())
    scheme = "https" if bucket.secure else "http"
    trailers = f"answered with {refusal}" if refusal else "taken"
    said = (
        f"boto3's default, checksum trailers, is {trailers} over {scheme}; "
        "we send Content-MD5 and no trailers (when_required), which every server we know takes"
    )
    if bucket.refuses_damage(bench.fresh_key()):
        return Finding(f"{said}; this one refuses a body that does not fit it")
    return Finding(f"{said}; this one ignores it: damage shows when a checkpoint's digest is verified")


def latency(bench: Bench) -> Finding:
    taken: list[float] = []
    for _ in range(_SMALL_PUTS):
        key, start = bench.fresh_key(), time.perf_counter()
        bench.store.put(key, b"x" * 1024)
        taken.append(time.perf_counter() - start)
    median_s = statistics.median(taken)
    return Finding(
        f"a small object is written in {median_s * 1000:.1f} ms",
        figures={"small_put_s": round(median_s, 6)},
    )


def throughput(bench: Bench) -> Finding:
    """Send and fetch ever larger objects, up to the largest that should still fit the time."""
    spent_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for size in TRANSFER_SIZES:
            key, file = bench.fresh_key(), Path(folder) / "file"
            file.write_bytes(os.urandom(size))
            up_s = _timed(partial(bench.store.put, key, file))
            down_s = _timed(partial(bench.store.download, key, file))
            bench.store.delete([key])
            spent_s += up_s + down_s
            if spent_s + 4 * (up_s + down_s) > TRANSFER_S:
                break
    up, down = size / up_s, size / down_s
    return Finding(
        f"{up / 1e6:.1f} MB/s up, {down / 1e6:.1f} MB/s down, measured with {size / 1e6:.1f} MB: "
        f"{bench.checkpoint_bytes / 1e6:.0f} MB take {bench.checkpoint_bytes / up:.0f} s up",
        figures={"up_bytes_per_s": round(up), "down_bytes_per_s": round(down), "measured_bytes": size},
    )


def disk(bench: Bench) -> Finding:
    """A checkpoint is written to the disk before it is sent, and the one before may still be under way."""
    folder = tempfile.gettempdir()
    free, need = shutil.disk_usage(folder).free, 2 * bench.checkpoint_bytes
    said = f"{folder} has {free / 1e9:.1f} GB free; two checkpoints of {bench.checkpoint_bytes / 1e6:.0f} MB"
    figures = {"free_bytes": free, "need_bytes": need}
    if free >= need:
        return Finding(f"{said} fit", figures=figures)
    todo = f"free {need / 1e9:.1f} GB there, or set TMPDIR to a folder on a larger disk"
    return Finding(f"{said} do not fit", todo, ok=False, figures=figures)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
