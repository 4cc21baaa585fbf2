"""The header of a safetensors file, as far as storage has to know it: how many tensors, of which widths.

Read cheaply and with bounds before anything is made of such a file: a header of 200,000 empty tensors is
small on the disk and takes seconds to parse, in every process that meets it.
"""

import json
import os
from pathlib import Path
from typing import BinaryIO

from .errors import InvalidName

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 20_000
LENGTH_BYTES = 8
_MAX_NAME = 200
"""Bytes of a tensor's name that a message shows."""
_GLANCE_BYTES = 65_536
"""As much of a header that is too long is read, to name what is in it."""

WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes of one element, of those types that have more than one."""


def check_header(file: BinaryIO, path: Path) -> None:
    """Refuse a safetensors file that is too costly to read. One that is damaged otherwise is not judged.

    Raises:
        InvalidName: Its header is longer than ``MAX_HEADER_BYTES`` or names more than ``MAX_TENSORS``.
        OSError
    """
    _header(file, path)


def element_width(file: BinaryIO, path: Path) -> int:
    """Return the width, 1, 2, 4 or 8, of the elements that most of a file's bytes belong to.

    1 for what is no safetensors file.

    Raises:
        InvalidName, OSError: See ``check_header``.
    """
    if path.suffix != SUFFIX:
        return 1
    text = _header(file, path)
    bytes_by_width = {1: 0}
    try:
        for name, tensor in json.loads(text).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                width = WIDTHS.get(tensor["dtype"], 1)
                bytes_by_width[width] = bytes_by_width.get(width, 0) + int(end) - int(begin)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 1  # whatever it is, it can be sent as it is
    return max(bytes_by_width, key=lambda width: (bytes_by_width[width], -width))


def _header(file: BinaryIO, path: Path) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > size - LENGTH_BYTES:
        return b""  # truncated, or no such file at all
    if length > MAX_HEADER_BYTES:
        said = f"its header has {length} bytes, at most {MAX_HEADER_BYTES}"
        raise InvalidName(f"{path}: {said}{_first(file.read(_GLANCE_BYTES))}: write fewer, larger tensors")
    text = file.read(length)
    if (tensors := text.count(b'"data_offsets"')) > MAX_TENSORS:
        said = f"{tensors} tensors, at most {MAX_TENSORS}"
        raise InvalidName(f"{path}: {said}{_first(text)}: write fewer, larger ones")
    return text


def _first(text: bytes) -> str:
    """Say what the first tensor of a header is called, without parsing it; nothing if it does not tell."""
    before, found, _ = text.partition(b'"data_offsets"')
    name = before[: before.rfind(b"{")].rstrip(b" :").removesuffix(b'"')
    said = name[name.rfind(b'"') + 1 :][:_MAX_NAME].decode(errors="replace")
    return f", the first {said}" if found else ""
