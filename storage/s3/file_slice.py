"""Parts of a file as bodies of requests, and the digest that goes with them."""

import base64
import hashlib
import os

_CHUNK_BYTES = 1 << 20


class FileSlice:
    """A part of an open file as a body to send: read as it is sent, so that memory does not grow with it.

    Args:
        hashing: Hash what is read, from beginning to end, while the server is busy with what it got before.
    """

    def __init__(self, descriptor: int, start: int, length: int, *, hashing: bool = False) -> None:
        self._descriptor = descriptor
        self._start = start
        self._length = length
        self._at = 0
        self._digest = hashlib.md5(usedforsecurity=False) if hashing else None

    def __len__(self) -> int:
        return self._length

    def read(self, count: int = -1) -> bytes:
        wanted = self._length - self._at
        if count >= 0:
            wanted = min(wanted, count)
        if wanted == 0:
            return b""
        chunk = os.pread(self._descriptor, wanted, self._start + self._at)
        if not chunk:
            raise OSError("the file became shorter while it was sent")
        self._at += len(chunk)
        if self._digest is not None:
            self._digest.update(chunk)
        return chunk

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        if self._digest is not None and self._at == 0:
            self._digest = hashlib.md5(usedforsecurity=False)  # it is sent once more
        return self._at

    def tell(self) -> int:
        return self._at

    @property
    def sent_md5(self) -> bytes:
        """Of what was read. Only with ``hashing``."""
        assert self._digest is not None
        return self._digest.digest()

    def md5(self) -> bytes:
        digest = hashlib.md5(usedforsecurity=False)
        self.seek(0)
        while chunk := self.read(_CHUNK_BYTES):
            digest.update(chunk)
        self.seek(0)
        return digest.digest()


def content_md5(digest: bytes) -> str:
    """The value of the ``Content-MD5`` header."""
    return base64.b64encode(digest).decode()


def md5_of(body: bytes) -> str:
    """That value for a body."""
    return content_md5(hashlib.md5(body, usedforsecurity=False).digest())
