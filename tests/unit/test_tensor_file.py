"""Our safetensors files are the library's own, byte for byte, but for the order of metadata."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from storage.errors import InvalidName
from storage.tensor_header import MAX_TENSORS
from trainer import tensor_file
from trainer.tensor_file import read, to_bytes, write

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Every type twice, with awkward names and shapes."""
    shapes: tuple[tuple[int, ...], ...] = ((), (0, 3), (5,), (2, 1, 3))
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}{place}#é": (100 * torch.rand(shapes[place % 4], generator=generator)).to(dtype)
        for place, dtype in enumerate(DTYPES)
        for name in ("z.", "a_")
    }


def test_a_file_is_the_librarys_own(tensors: dict[str, torch.Tensor]) -> None:
    assert to_bytes(tensors, {"only": 'one "é"'}) == save(tensors, metadata={"only": 'one "é"'})


def test_the_order_of_tensors_and_metadata_does_not_show(tensors: dict[str, torch.Tensor]) -> None:
    turned = dict(reversed(tensors.items()))

    assert to_bytes(turned, {"b": "1", "a": "2"}) == to_bytes(tensors, {"a": "2", "b": "1"})


def test_what_was_written_is_read_back(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"

    write(path, tensors, {"a": "2"})

    found, metadata = read(path)
    assert path.read_bytes() == to_bytes(tensors, {"a": "2"})
    assert metadata == {"a": "2"}
    assert {n: (t.dtype, t.shape, t.tolist()) for n, t in found.items()} == {
        n: (t.dtype, t.shape, t.tolist()) for n, t in tensors.items()
    }


def test_more_tensors_than_a_reader_will_take_are_not_written(tmp_path: Path) -> None:
    many = {str(n): torch.empty(0) for n in range(MAX_TENSORS + 1)}
    with pytest.raises(InvalidName, match="20001 tensors, at most 20000"):
        write(tmp_path / "x.safetensors", many, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_too_many_tensors_is_not_even_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({f"t{n}": torch.empty(0) for n in range(MAX_TENSORS + 1)}))
    parsed: list[Path] = []
    monkeypatch.setattr(tensor_file, "safe_open", parsed.append)
    with pytest.raises(InvalidName, match="20001 tensors, at most 20000"):
        read(path)
    assert parsed == []
