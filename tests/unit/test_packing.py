"""Packing is an exact inverse of itself for any bytes, bounded in memory, and hostile bytes are refused."""

import hashlib
import io
import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from storage import packing
from storage.errors import Corrupt, InvalidName, StorageError
from storage.packing import (
    BLOCK_BYTES,
    Packing,
    codec_of,
    measure,
    pack,
    shuffled,
    unpack,
    unshuffled,
)
from storage.records import Packed, StoredFile
from storage.tensor_header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    check_header,
    element_width,
)

WIDTHS = (1, 2, 4, 8)


def stored(body: bytes, name: str = "a.safetensors") -> StoredFile:
    return StoredFile(name=name, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def packed_file(folder: Path, body: bytes, width: int) -> StoredFile:
    """The record of a body that is packed into the file ``packed``."""
    file = stored(body)
    return file.model_copy(update={"packed": pack(io.BytesIO(body), folder / "packed", file, width)})


def tensors(**kinds: tuple[str, int]) -> bytes:
    """A safetensors file with tensors of these types and so many bytes."""
    header, end = {}, 0
    for name, (dtype, size) in kinds.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * end


@given(st.binary(max_size=200), st.sampled_from(WIDTHS))
def test_shuffling_only_moves_bytes(block: bytes, width: int) -> None:
    assert unshuffled(shuffled(block, width), width) == block
    assert sorted(shuffled(block, width)) == sorted(block)


def test_bytes_of_one_place_lie_side_by_side() -> None:
    assert shuffled(b"AaBbCcx", 2) == b"ABCabcx"


@given(
    st.sampled_from((0, 1, 7, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 3, 2 * BLOCK_BYTES + 4097)),
    st.sampled_from(WIDTHS),
    st.sampled_from(("<f4", "<f8", "<f2", "<i8", "u1")),
    st.integers(0, 2**32 - 1),
)
def test_any_array_comes_back_bit_by_bit(size: int, width: int, dtype: str, seed: int) -> None:
    numbers = np.random.default_rng(seed).standard_normal(size // 2 + 1) * 100
    body = numbers.astype(dtype).tobytes()[:size]

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        file = packed_file(folder, body, width)
        unpack(folder / "packed", folder / "out", file)
        out, lying_there = (folder / "out").read_bytes(), (folder / "packed").read_bytes()

    assert file.packed is not None
    assert file.packed.codec == codec_of(width)
    assert out == body
    assert (len(lying_there), hashlib.sha256(lying_there).hexdigest()) == (
        file.packed.size_bytes,
        file.packed.sha256,
    )


def test_numbers_of_training_shrink_and_the_sample_says_so(tmp_path: Path) -> None:
    body = (np.random.default_rng(1).standard_normal(2_000_000) * 1e-3).astype(np.float32).tobytes()
    file = packed_file(tmp_path, body, 4)
    assert file.packed is not None
    ratio = file.packed.size_bytes / len(body)
    assert ratio < 0.87
    assert measure(io.BytesIO(body), 4).ratio == pytest.approx(ratio, abs=0.02)
    assert measure(io.BytesIO(body), 1).ratio > 0.9, "it is the shuffling that makes them shrink"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    body = b"0123456789abcdef" * (3 * BLOCK_BYTES)  # 48 MiB
    source = io.BytesIO(body)
    file = stored(body)
    tracemalloc.start()
    file = file.model_copy(update={"packed": pack(source, tmp_path / "packed", file, 4)})
    unpack(tmp_path / "packed", tmp_path / "out", file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("packing", "link_bytes_s", "pays"),
    [
        (Packing(ratio=0.84, bytes_s=500e6), 1.25e6, True),  # 10 Mbit/s
        (Packing(ratio=0.84, bytes_s=500e6), 12.5e6, True),  # 100 Mbit/s
        (Packing(ratio=0.84, bytes_s=500e6), 1e9, False),  # loopback
        (Packing(ratio=0.84, bytes_s=500e6), 125e6, False),  # a LAN: as fast as packing saves
        (Packing(ratio=0.84, bytes_s=500e6), None, True),
        (Packing(ratio=0.99, bytes_s=500e6), None, False),
        (Packing(ratio=0.99, bytes_s=500e6), 1e3, False),
    ],
)
def test_packing_pays_where_the_link_is_slower_than_it(
    packing: Packing, link_bytes_s: float | None, pays: bool
) -> None:
    assert packing.pays(link_bytes_s) is pays


def test_a_file_that_is_not_what_its_record_says_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="sha256 is"):
        pack(io.BytesIO(b"other"), tmp_path / "packed", stored(b"bytes"), 4)
    with pytest.raises(Corrupt, match="4 bytes, its record says 5"):
        pack(io.BytesIO(b"byte"), tmp_path / "packed", stored(b"bytes"), 4)


def damaged(how: str, body: bytes) -> bytes:
    match how:
        case "a bit":
            return body[:100] + bytes([body[100] ^ 1]) + body[101:]
        case "cut":
            return body[:-1]
        case "longer":
            return body + b"x"
        case "empty":
            return b""
        case _:
            return b"not zstd at all" * 40


@pytest.mark.parametrize("how", ["a bit", "cut", "longer", "empty", "foreign"])
def test_damage_of_what_was_fetched_is_found(tmp_path: Path, how: str) -> None:
    file = packed_file(tmp_path, np.arange(50_000, dtype=np.float32).tobytes(), 4)
    path = tmp_path / "packed"
    path.write_bytes(damaged(how, path.read_bytes()))
    with pytest.raises(Corrupt, match="packed"):
        unpack(path, tmp_path / "out", file)


def test_another_file_packed_right_is_found_out_too(tmp_path: Path) -> None:
    """The record's digests are of two files that do not belong together."""
    other = packed_file(tmp_path, b"other" * 1000, 4)
    file = stored(b"bytes" * 1000).model_copy(update={"packed": other.packed})
    with pytest.raises(Corrupt, match="unpacked: sha256 is"):
        unpack(tmp_path / "packed", tmp_path / "out", file)


def test_a_bomb_writes_no_more_than_the_record_allows(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * BLOCK_BYTES))
    (tmp_path / "packed").write_bytes(bomb)
    packed = Packed(codec="zstd", size_bytes=len(bomb), sha256=hashlib.sha256(bomb).hexdigest())
    file = stored(b"small").model_copy(update={"packed": packed})
    with pytest.raises(Corrupt, match="unpacks to more than the 5 bytes"):
        unpack(tmp_path / "packed", tmp_path / "out", file)
    assert (tmp_path / "out").stat().st_size <= 5


def test_a_stream_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = compressor.compress(b"x" * 100) + compressor.flush()
    (tmp_path / "packed").write_bytes(body)
    packed = Packed(codec="zstd", size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
    file = stored(b"x" * 100).model_copy(update={"packed": packed})
    with pytest.raises(Corrupt, match="cannot be unpacked"):
        unpack(tmp_path / "packed", tmp_path / "out", file)


@pytest.mark.parametrize("codec", ["brotli", "shuffle3.zstd", "shuffle4.zstd.more"])
def test_a_codec_from_the_future_is_no_damage(tmp_path: Path, codec: str) -> None:
    file = packed_file(tmp_path, b"bytes" * 100, 4)
    assert file.packed is not None
    file = file.model_copy(update={"packed": file.packed.model_copy(update={"codec": codec})})
    with pytest.raises(StorageError, match=f"'{codec}', which this version cannot unpack") as caught:
        unpack(tmp_path / "packed", tmp_path / "out", file)
    assert type(caught.value) is StorageError, "Corrupt would let a good checkpoint be given up"


@pytest.mark.parametrize(
    ("body", "width"),
    [
        (tensors(a=("F32", 400)), 4),
        (tensors(a=("F32", 400), b=("BF16", 300)), 4),
        (tensors(a=("F32", 400), b=("BF16", 600)), 2),
        (tensors(moment=("U8", 800), scale=("F32", 40)), 1),  # 8-bit optimizer state
        (tensors(), 1),
        (b"", 1),
        (b"\x10", 1),
        ((10).to_bytes(8, "little") + b"[1, 2, 3] ", 1),
        ((10).to_bytes(8, "little") + b"{" * 10, 1),
        ((2**60).to_bytes(8, "little") + b"{}", 1),
        (b'{"a": "a text file of no kind"}', 1),
    ],
)
def test_the_width_is_that_of_most_bytes(body: bytes, width: int) -> None:
    assert element_width(io.BytesIO(body), Path("a.safetensors")) == width


def test_other_files_have_no_elements() -> None:
    assert element_width(io.BytesIO(tensors(a=("F32", 400))), Path("a.bin")) == 1


def test_a_file_of_too_many_tensors_is_refused_without_parsing_it() -> None:
    kinds = {f"t{n}": ("F32", 0) for n in range(MAX_TENSORS + 1)}
    with pytest.raises(InvalidName, match=f"{MAX_TENSORS + 1} tensors, at most {MAX_TENSORS}"):
        check_header(io.BytesIO(tensors(**kinds)), Path("many.safetensors"))
    del kinds["t0"]
    check_header(io.BytesIO(tensors(**kinds)), Path("many.safetensors"))


def test_of_too_long_a_header_no_more_than_a_glance_is_read() -> None:
    class Unread(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size in range((1 << 16) + 1), "more than a glance was read"
            return super().read(size)

    body = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1)
    with pytest.raises(InvalidName, match=f"{MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}"):
        check_header(Unread(body), Path("long.safetensors"))


def test_what_does_not_shrink_is_known_before_it_is_packed() -> None:
    noise = np.random.default_rng(1).bytes(4 * BLOCK_BYTES)
    assert measure(io.BytesIO(noise), 1).ratio > packing.MAX_RATIO
    assert measure(io.BytesIO(b""), 4).ratio == 1.0
