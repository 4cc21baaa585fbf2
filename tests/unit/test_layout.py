"""Keys: built and parsed in one place, and nothing that could escape a directory becomes one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import layout
from storage.errors import InvalidName
from storage.layout import BatchKey, DataKey

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
FILES = st.from_regex(r"[a-zA-Z0-9_-]{1,20}(/[a-zA-Z0-9_.-]{0,20}[a-z]){0,3}", fullmatch=True)


def test_the_layout_is_the_documented_one() -> None:
    assert layout.sweep_spec("night") == "sweeps/night/spec.json"
    assert layout.run_spec("cat-r16") == "runs/cat-r16/spec.json"
    assert layout.log_entry(layout.run_log_prefix("cat-r16"), 7) == "runs/cat-r16/log/000000000007.json"
    assert (
        layout.checkpoint_file("cat-r16", 2, "0a1b2c3d", 1200, "state/opt.safetensors")
        == "runs/cat-r16/data/000002-0a1b2c3d/000001200/state/opt.safetensors"
    )
    assert layout.events_key("cat-r16", 2, 5) == "runs/cat-r16/events/000002/000005.jsonl"
    assert layout.log_text_key("cat-r16", 2, 5) == "runs/cat-r16/logs/000002/000005.txt"
    assert layout.sample_key("cat-r16", 100, "0-1.png") == "runs/cat-r16/samples/000000100/0-1.png"


@given(run=NAMES, attempt=st.integers(1, 999_999), step=st.integers(0, 999_999_999), file=FILES)
def test_what_is_built_is_parsed_back(run: str, attempt: int, step: int, file: str) -> None:
    data = layout.checkpoint_file(run, attempt, "0a1b2c3d", step, file)
    assert layout.parse_data(data) == DataKey(
        run=run, attempt=attempt, incarnation="0a1b2c3d", step=step, file=file
    )
    batch = BatchKey(run=run, attempt=attempt, n=step % 1_000_000)
    assert layout.parse_batch(layout.events_key(run, attempt, batch.n)) == batch
    assert layout.parse_batch(layout.log_text_key(run, attempt, batch.n)) == batch
    assert layout.parse_sample(layout.sample_key(run, step, file)) == (run, step, file)
    assert layout.parse_spec(layout.run_spec(run)) == ("runs", run)
    assert layout.parse_spec(layout.sweep_spec(run)) == ("sweeps", run)
    prefix = layout.run_log_prefix(run)
    assert layout.parse_log_entry(prefix, layout.log_entry(prefix, step)) == step


@pytest.mark.parametrize(
    "key",
    [
        "runs/cat/log/7.json",
        "runs/cat/log/000000000007.json.tmp",
        "runs/cat/log/sub/000000000007.json",
        "runs/dog/log/000000000007.json",
        "000000000007.json",
    ],
)
def test_a_stray_object_is_no_log_entry(key: str) -> None:
    assert layout.parse_log_entry("runs/cat/log/", key) is None


@pytest.mark.parametrize(
    "key",
    [
        "runs/cat/data/000001-XYZ/000000001/f",
        "runs/cat/data/1-0a1b2c3d/000000001/f",
        "runs/C/data/x",
        "x",
        "",
    ],
)
def test_a_stray_object_is_no_checkpoint_file(key: str) -> None:
    assert layout.parse_data(key) is None


def test_digits_of_other_scripts_are_no_second_name_for_a_number() -> None:
    assert layout.parse_data("runs/cat/data/٠٠٠٠٠١-0a1b2c3d/000000001/f") is None
    assert layout.parse_data("runs/cat/data/000001-0a1b2c3d/٠٠٠٠٠٠٠٠١/f") is None
    assert layout.parse_batch("runs/cat/events/000001/٠٠٠٠٠١.jsonl") is None
    assert layout.parse_sample("runs/cat/samples/٠٠٠٠٠٠٠٠١/a.png") is None
    assert layout.parse_log_entry("runs/cat/log/", "runs/cat/log/٠٠٠٠٠٠٠٠٠٠٠١.json") is None
    assert layout.parse_content(f"content/{'d' * 64}/log/٠٠٠٠٠٠٠٠٠٠٠١.json") is None


@given(st.lists(st.integers(0, 10**9), min_size=2, unique=True))
def test_key_order_is_number_order(numbers: list[int]) -> None:
    in_key_order = sorted(numbers, key=lambda n: layout.log_entry("log/", n))
    assert in_key_order == sorted(numbers)


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "a b", "ü", "a" * 64, "a\n", "..", "a\0"])
def test_a_run_name_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(InvalidName, match=r"run name .*: use 1 to 63 lower-case letters"):
        layout.check_name("run", name)
    with pytest.raises(InvalidName):
        layout.run_spec(name)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../../etc/passwd", "'.' and '..' are not allowed"),
        ("a/../b", "'.' and '..' are not allowed"),
        ("/etc/passwd", "leading, trailing or double"),
        ("a//b", "leading, trailing or double"),
        ("a/", "leading, trailing or double"),
        ("", "empty"),
        ("a\\b", "backslashes"),
        ("a\0b", "control characters"),
        ("a\x1b[31m", "control characters"),
        ("a\x85b", "control characters"),
        ("\ud800", "not valid text"),
        ("a/" * 450 + "b", "901 bytes long, at most 900"),
        ("ü" * 128, "256 bytes long, at most 255"),
    ],
)
def test_a_path_that_a_disk_could_misread_is_refused(path: str, reason: str) -> None:
    with pytest.raises(InvalidName, match=reason) as refused:
        layout.check_path(path)
    assert str(refused.value).isprintable(), "the message must be safe to print"


def test_the_whole_key_counts_for_its_length() -> None:
    file = "/".join(["f" * 200] * 4)
    layout.check_path(file)
    assert len(layout.checkpoint_file("r", 1, "0a1b2c3d", 1, file)) < 900
    with pytest.raises(InvalidName, match="bytes long, at most 900"):
        layout.checkpoint_file("r" * 63, 1, "0a1b2c3d", 1, file + "f")


def test_files_that_one_disk_cannot_hold_together_are_refused() -> None:
    layout.check_files(["a", "b/a", "b/c"])
    with pytest.raises(InvalidName, match=r"'Adapter.bin': collides with 'adapter.bin'"):
        layout.check_files(["adapter.bin", "Adapter.bin"])
    with pytest.raises(InvalidName, match="'a': also a directory of 'a/b'"):
        layout.check_files(["a/b", "a"])


@pytest.mark.parametrize("number", [-1, 10**6])
def test_a_number_that_outgrows_its_padding_is_refused(number: int) -> None:
    with pytest.raises(InvalidName, match="attempt"):
        layout.events_prefix("r", number)


def test_an_incarnation_is_eight_hexadecimal_digits() -> None:
    with pytest.raises(InvalidName, match="8 hexadecimal digits"):
        layout.checkpoint_prefix("r", 1, "../../xx", 1)
