"""What nodes ask of a grant desk, and send, in tests on a real server."""

import hashlib

from support.runs import incarnation

from storage.records import Committed, StoredFile
from storage.scoped.grants import Write

BODY = b"weights of step ten"


def write(key: str, body: bytes = BODY) -> Write:
    return Write(key=key, size_bytes=len(body), md5=md5(body))


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def commit(step: int, body: bytes = BODY, **changes: object) -> Committed:
    file = StoredFile(
        name="adapter.safetensors", size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest()
    )
    values: dict[str, object] = {
        "attempt": 1, "incarnation": incarnation(1), "step": step, "files": (file,), "at": 1.0,
    }  # fmt: skip
    return Committed.model_validate({**values, **changes})
