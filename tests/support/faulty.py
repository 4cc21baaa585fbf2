"""A corner of a real server behind a proxy, and what arrives there."""

from dataclasses import dataclass
from pathlib import Path

from support.fault_proxy import FaultProxy
from support.faults import matching

from storage.object_store import ObjectStore
from storage.s3.store import S3Store

PARTS = 5
part_puts = matching("PUT", "partNumber=")


@dataclass(frozen=True)
class Faulty:
    """A corner of a server, once through the proxy and once not."""

    proxy: FaultProxy
    store: S3Store
    direct: ObjectStore


def is_there(faulty: Faulty, key: str, path: Path, tmp_path: Path) -> bool:
    faulty.direct.download(key, tmp_path / "copy")
    return (tmp_path / "copy").read_bytes() == path.read_bytes()
