"""safetensors files whose bytes depend on their content only.

The library writes a header's metadata in an order that changes from process to process, and builds the whole
file in memory several times over, holding the interpreter's lock while a training step waits for it. Here the
header is sorted, so that equal adapters are equal files, and tensors go to the file one by one, uncopied.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from storage.errors import InvalidName
from storage.tensor_header import MAX_TENSORS, check_header

_LENGTH_BYTES = 8

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of types, in the order in which the library lays tensors out: wide ones first, so that
each starts at a multiple of its own size."""


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the file: header length, header as JSON padded with spaces, then the tensors' bytes."""
    return b"".join(_parts(tensors, metadata))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what ``to_bytes`` returns. Other threads run on while the system takes the bytes.

    Raises:
        InvalidName: There are more tensors than a file may have; nothing was written.
    """
    if len(tensors) > MAX_TENSORS:
        raise InvalidName(f"{path}: {len(tensors)} tensors, at most {MAX_TENSORS}")
    with path.open("wb") as file:
        for part in _parts(tensors, metadata):
            file.write(part)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        SafetensorError, OSError: It is no safetensors file, is truncated, or cannot be read.
        InvalidName: It names so many tensors that reading it is refused.
    """
    with path.open("rb") as unread:
        check_header(unread, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata() or {}


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    widest_first = {dtype: place for place, dtype in enumerate(_DTYPES)}
    names = sorted(tensors, key=lambda name: (widest_first[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
    for name in names:
        flat = tensors[name].detach().contiguous().cpu().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
