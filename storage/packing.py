"""Fewer bytes, exactly: the bytes of a file's numbers sorted by their place in the number, then zstd.

A file is cut into blocks of ``BLOCK_BYTES``. In each, the first bytes of all elements come first, then all
second bytes, and so on: signs and exponents, which are alike, lie side by side. All blocks together are one
zstd stream. The codec's name says what was done: ``shuffle4.zstd``, or ``zstd`` for elements of one byte.

Packing and unpacking are exact inverses, hold a few blocks in memory whatever the file's size, and check both
digests while the bytes pass. Unpacking never writes more than the record states.
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import zstandard

from .errors import Corrupt, StorageError
from .records import Packed, StoredFile

LEVEL = 1
BLOCK_BYTES = 1 << 20
MAX_RATIO = 0.95
"""What does not shrink to this is sent as it is."""
SAMPLES = 4
"""So many blocks, spread over a file, say how well and how fast it packs."""
_MAX_WINDOW_BYTES = 1 << 23
"""A stream that asks for more memory than level 1 ever does was not written by us."""

_CODEC = re.compile(r"(?:shuffle([248])\.)?zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a file packs, measured."""

    ratio: float
    """Packed size by size."""
    bytes_s: float
    """Bytes of the file that are packed each second."""

    def pays(self, link_bytes_s: float | None) -> bool:
        """Whether sending the file packed takes less time than sending it as it is.

        A link that was not measured yet counts as slow: it is those that cost hours.
        """
        if self.ratio > MAX_RATIO:
            return False
        return link_bytes_s is None or (1 - self.ratio) / link_bytes_s > 1 / self.bytes_s


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def codec_of(width: int) -> str:
    """The codec for elements of so many bytes."""
    return f"shuffle{width}.zstd" if width > 1 else "zstd"


def is_known(codec: str) -> bool:
    """Whether ``unpack`` can undo it."""
    return _CODEC.fullmatch(codec) is not None


def measure(file: BinaryIO, width: int) -> Packing:
    """Pack a few blocks of a file and forget them."""
    began, size = time.perf_counter(), file.seek(0, os.SEEK_END)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    packed = taken = 0
    for place in range(min(SAMPLES, -(-size // BLOCK_BYTES))):
        # Whole elements: a block that begins inside one would pack worse than the file does.
        file.seek(size * place // SAMPLES // 8 * 8)
        block = file.read(BLOCK_BYTES)
        packed += len(compressor.compress(shuffled(block, width)))
        taken += len(block)
    elapsed_s = max(time.perf_counter() - began, 1e-9)
    return Packing(ratio=packed / taken if taken else 1.0, bytes_s=taken / elapsed_s)


def pack(source: BinaryIO, target: Path, file: StoredFile, width: int) -> Packed:
    """Write what is read from ``source`` to ``target``, packed.

    Raises:
        Corrupt: It is not the file that the record states.
        OSError: The disk is full.
    """
    raw, size = hashlib.sha256(), 0
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    with target.open("wb") as packed:
        sink = _Hashing(packed)
        with compressor.stream_writer(sink, closefd=False) as writer:  # type: ignore[arg-type]
            while block := source.read(BLOCK_BYTES):
                raw.update(block)
                size += len(block)
                writer.write(shuffled(block, width))
    _check(file.name, file.size_bytes, file.sha256, size, raw)
    return Packed(codec=codec_of(width), size_bytes=sink.size, sha256=sink.digest.hexdigest())


def unpack(path: Path, target: Path, file: StoredFile) -> None:
    """Write to ``target`` what was packed into the file at ``path``, and check both against the record.

    Raises:
        Corrupt: What was fetched, or what it unpacks to, is not what the record says.
        StorageError: The codec is not known to this version.
        OSError: The disk is full.
    """
    assert file.packed is not None
    known = _CODEC.fullmatch(file.packed.codec)
    if known is None:
        raise StorageError(
            f"{file.name} is stored as {file.packed.codec!r}, which this version cannot unpack: "
            "use the version that wrote it, or a newer one"
        )
    width = int(known[1] or 1)
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as packed:
        source = _Limited(packed, file.packed.size_bytes)
        try:
            with (
                zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(
                    source,  # type: ignore[arg-type]
                    read_across_frames=True,
                    closefd=False,
                ) as reader,
                target.open("wb") as sink,
            ):
                while block := _block(reader):
                    size += len(block)
                    if size > file.size_bytes:
                        raise Corrupt(
                            f"{path}: unpacks to more than the {file.size_bytes} bytes of its record"
                        )
                    block = unshuffled(block, width)
                    digest.update(block)
                    sink.write(block)
        except zstandard.ZstdError as error:
            raise Corrupt(f"{path}: cannot be unpacked: {error}") from error
        finally:
            source.finish()
    _check(str(path), file.packed.size_bytes, file.packed.sha256, source.size, source.digest)
    _check(f"{path}, unpacked", file.size_bytes, file.sha256, size, digest)


def shuffled(block: bytes, width: int) -> bytes:
    """Return the first bytes of all elements, then all second ones, …, then what is no whole element."""
    if width == 1:
        return block
    whole = len(block) // width * width
    elements = np.frombuffer(block, np.uint8, whole).reshape(-1, width)
    return elements.T.tobytes() + block[whole:]


def unshuffled(block: bytes, width: int) -> bytes:
    """The inverse of ``shuffled``."""
    if width == 1:
        return block
    whole = len(block) // width * width
    planes = np.frombuffer(block, np.uint8, whole).reshape(width, -1)
    return planes.T.tobytes() + block[whole:]


def _block(reader: BinaryIO) -> bytes:
    """The next whole block: a stream may give less than it is asked for."""
    parts, missing = [], BLOCK_BYTES
    while missing and (part := reader.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _check(what: str, size_bytes: int, sha256: str, actual_bytes: int, digest: _Digest) -> None:
    if actual_bytes != size_bytes:
        raise Corrupt(f"{what}: {actual_bytes} bytes, its record says {size_bytes}")
    if digest.hexdigest() != sha256:
        raise Corrupt(f"{what}: sha256 is {digest.hexdigest()[:12]}, its record says {sha256[:12]}")


class _Hashing:
    """Writes on to a file, hashing and counting."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest: _Digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class _Limited:
    """Reads no more of a file than its record states, hashing and counting."""

    def __init__(self, file: BinaryIO, limit_bytes: int) -> None:
        self._file = file
        self._limit_bytes = limit_bytes
        self.digest: _Digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        left = self._limit_bytes - self.size
        data = self._file.read(left if size < 0 else min(size, left))
        self.digest.update(data)
        self.size += len(data)
        return data

    def finish(self) -> None:
        """Take in what the decoder did not ask for: bytes too many show in the size."""
        while self.read(BLOCK_BYTES):
            pass
        self.size += len(self._file.read(1))
