"""The one place that reads a store's url.

/srv/loras, ./loras, file:///srv/loras, file://./loras    a folder
s3://bucket/prefix?endpoint=https://…&region=…            a bucket; credentials come from the environment
memory://name                                             this process's memory, one store per name
"""

import re
import threading
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from . import layout
from .directory import DirectoryStore
from .errors import InvalidName
from .memory import MemoryStore
from .object_store import ObjectStore

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_memory_stores: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def open_store(url: str, *, check_then_put: bool = False) -> ObjectStore:
    """Open the store that a url names. Nothing is read or written yet.

    Args:
        check_then_put: For a bucket whose create-only is not atomic (see ``probe``): ``create`` looks
            whether the key is free and then writes. Right for a single writer, such as the controller.

    Raises:
        InvalidName: The url is not one of the forms above, or it contains credentials.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return _open_path(url)
    match scheme[1].lower():
        case "file":
            return _open_file(url)
        case "memory":
            return _open_memory(url)
        case "s3":
            return _open_s3(urlsplit(url), check_then_put)
        case other:
            raise InvalidName(
                f"store url with scheme {other!r}: "
                "use a path, file:///path, s3://bucket/prefix or memory://name"
            )


def _open_path(path: str) -> ObjectStore:
    if not path.strip() or "\0" in path:
        raise InvalidName("store url is empty: use a path, file:///path or s3://bucket/prefix")
    return DirectoryStore(Path(path).expanduser())


def _open_file(url: str) -> ObjectStore:
    path = unquote(url[len("file://") :])
    if not path.startswith(("/", "./", "../")) and path not in {".", ".."}:
        raise InvalidName(
            f"store url {url!r}: a file url has three slashes, file:///path, "
            "or a relative path, file://./path"
        )
    return _open_path(path)


def _open_memory(url: str) -> ObjectStore:
    name = layout.check_name("memory store", url[len("memory://") :])
    with _memory_lock:
        return _memory_stores.setdefault(name, MemoryStore(name))


def _open_s3(parts: SplitResult, check_then_put: bool) -> ObjectStore:
    # Messages from here on never repeat the url: what was wrongly written into it may be a secret.
    if "@" in parts.netloc:
        raise InvalidName(
            "store url contains credentials: remove them, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or an AWS profile instead"
        )
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidName(
            f"store url: bucket {bucket!r} is not 3 to 63 lower-case letters, digits, dots and dashes"
        )
    if prefix:
        layout.check_path(prefix, "prefix in the store url")
    endpoint, region = _options(parts)
    from .s3.store import S3Store  # boto3 takes long to import, and a folder needs none of it

    return S3Store(bucket, prefix, endpoint=endpoint, region=region, check_then_put=check_then_put)


def _options(parts: SplitResult) -> tuple[str | None, str | None]:
    options = parse_qsl(parts.query, keep_blank_values=True)
    unknown = sorted({name for name, _ in options} - {"endpoint", "region"})
    if unknown or parts.fragment or len(dict(options)) != len(options):
        raise InvalidName(
            "store url: only ?endpoint=…&region=… may follow the bucket and prefix, each once"
            + (f", not {', '.join(map(repr, unknown))}" if unknown else "")
            + "; credentials come from the environment"
        )
    chosen = dict(options)
    return _endpoint(chosen.get("endpoint")), _region(chosen.get("region"))


def _endpoint(endpoint: str | None) -> str | None:
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        parts.port  # noqa: B018  (reading it checks it)
    except ValueError:
        raise InvalidName("store url: the endpoint is not a url such as https://host:port") from None
    if "@" in parts.netloc:
        raise InvalidName("store url: the endpoint contains credentials: set AWS_ACCESS_KEY_ID instead")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise InvalidName("store url: the endpoint is not a url such as https://host:port")
    return endpoint.rstrip("/")


def _region(region: str | None) -> str | None:
    if region is not None and not _REGION.fullmatch(region):
        raise InvalidName(f"store url: {region!r} is not a region such as us-east-1")
    return region
