"""Large objects into files: after a cut the rest, of the same object, is asked for by ``Range``."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from .deadline import left_s, within
from .errors import FOREIGN, STREAM_ERRORS, status_of
from .retry import TRIES, RetryBudget, Send, pause_s
from .uplink import allowance_s

_CHUNK_BYTES = 1 << 20
"""Also what has to arrive for a cut to be one of many small ones, rather than one more in vain."""


@dataclass(slots=True)
class _Version:
    """Which content of the key the file holds a beginning of."""

    etag: str
    size_bytes: int


class Download:
    """One object on its way into an open file.

    Args:
        request_s: What an answer may take, and each chunk on top of the time that its bytes need.
    """

    def __init__(
        self, request: Send, budget: RetryBudget, bucket: str, key: str, full_key: str, request_s: float
    ) -> None:
        self._request = request
        self._budget = budget
        self._bucket = bucket
        self._key = key
        self._full_key = full_key
        self._chunk_s = request_s + allowance_s(_CHUNK_BYTES, None)
        self._version: _Version | None = None

    def into(self, file: BinaryIO) -> None:
        """Write the object to the file, from its beginning.

        Raises:
            botocore's own exceptions, for whoever translates them.
        """
        failures = 0
        while True:
            had = file.tell()
            try:
                if self._append_rest(file):
                    return
                failures += 1
                if failures == TRIES:
                    raise OSError("the object changes again and again while it is read")
            except STREAM_ERRORS:
                failures = 1 if file.tell() - had >= _CHUNK_BYTES else failures + 1
                if failures == TRIES or left_s() <= 0 or not self._budget.spend():
                    raise
                time.sleep(pause_s(failures))

    def _append_rest(self, file: BinaryIO) -> bool:
        """Write what the file does not have yet; False if the object has changed, and it begins anew."""
        offset = file.tell()
        if self._version is not None and offset >= self._version.size_bytes > 0:
            return True  # the cut came right after the last byte
        answer = self._request(self._key, self._asking(offset))
        if answer is not None:
            with contextlib.closing(answer["Body"]) as body:
                if self._continues(answer, offset):
                    while chunk := self._chunk(body):
                        file.write(chunk)
                    return True
        file.seek(0)
        file.truncate()
        self._version = None
        return False

    def _asking(self, offset: int) -> Callable[[Any], Any]:
        options = {"Range": f"bytes={offset}-"} if offset else {}

        def ask(client: Any) -> Any:
            try:
                return client.get_object(Bucket=self._bucket, Key=self._full_key, **options)
            except FOREIGN as error:
                if offset and status_of(error) == 416:
                    return None  # it has become shorter
                raise

        return ask

    def _continues(self, answer: Any, offset: int) -> bool:
        """Whether an answer's body belongs at the offset."""
        etag = answer.get("ETag", "")
        if not offset:
            self._version = _Version(etag, answer.get("ContentLength", 0))
            return True
        # Not by the status: rclone answers ranges with 200.
        partial = str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-")
        return partial and (self._version is None or etag == self._version.etag)

    def _chunk(self, body: Any) -> bytes:
        with within(self._chunk_s):
            chunk: bytes = body.read(_CHUNK_BYTES)
        return chunk
