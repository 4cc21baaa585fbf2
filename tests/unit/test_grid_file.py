"""Reading a sweep file: values, places, and what counts as the same file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidFile
from orchestrator.grid.file import parse, parse_value, read
from orchestrator.grid.overrides import overlaid

TEXT = """\
method: grid
parameters:
  rank: {values: [8, 0x10]}   # two
base:
  learning_rate: 1e-4
  revision: no
  seed:
description: |
  two
  lines
"""


def test_values_are_those_of_yaml_1_2() -> None:
    assert parse(TEXT, "grid.yaml").data == {
        "method": "grid",
        "parameters": {"rank": {"values": [8, 16]}},
        "base": {"learning_rate": 1e-4, "revision": "no", "seed": None},
        "description": "two\nlines\n",
    }


def test_every_key_and_value_has_its_place() -> None:
    document = parse(TEXT, "grid.yaml")
    assert document.where(("parameters", "rank"), key=True) == "grid.yaml:3:3"
    assert document.where(("parameters", "rank", "values", 1)) == "grid.yaml:3:22"
    assert document.where(("base", "learning_rate")) == "grid.yaml:5:18"
    assert document.where(("base", "seed")) == "grid.yaml:7:3"
    assert document.where(("base", "absent", 3)) == "grid.yaml:5:3"
    assert document.texts[("base", "learning_rate")] == "1e-4"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1_000", 1000),
        ("-7", -7),
        ("007", 7),
        ("0o17", 15),
        ("0b11", 3),
        ("+3", 3),
        ("true", True),
        ("no", "no"),
        ("~", None),
        ("2026-01-02", "2026-01-02"),
        ("'8'", "8"),
        ("!!str 8", "8"),
        ("[8, {a: 1.5}]", [8, {"a": 1.5}]),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ("", None),
    ],
)
def test_a_value_reads_as_people_mean_it(text: str, value: object) -> None:
    read_value = parse_value(text, "--set x")
    assert read_value == value
    assert type(read_value) is type(value)


def test_a_folded_text_is_one_line_without_marks_of_its_folds() -> None:
    assert parse("description: >-\n  two\n  lines\n", "grid.yaml").data == {"description": "two lines"}


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read(file).data == parse(TEXT, "grid.yaml").data


def test_json_is_accepted_with_tabs_and_slashes(tmp_path: Path) -> None:
    file = tmp_path / "grid.json"
    file.write_text('{\n\t"method": "grid",\n\t"dataset": {\n\t\t"path": "a\\/b"\n\t}\n}\n')
    document = read(file)
    assert document.data == {"method": "grid", "dataset": {"path": "a/b"}}
    assert document.where(("dataset", "path")) == f"{file}:4:11"


def test_an_alias_stands_for_what_it_names() -> None:
    document = parse("a: &one {x: 1}\nb: *one\nc: &one 2\nd: *one\n", "grid.yaml")
    assert document.data == {"a": {"x": 1}, "b": {"x": 1}, "c": 2, "d": 2}


def test_syntax_ends_the_search_but_other_mistakes_do_not() -> None:
    with pytest.raises(InvalidFile) as caught:
        parse("a: !x 1\na: 2\nb: !!python/name:os.system\n1: 2\n", "grid.yaml")
    assert [(problem.where, problem.code) for problem in caught.value.problems] == [
        ("grid.yaml:1:4", "E2107"),
        ("grid.yaml:2:1", "E2106"),
        ("grid.yaml:3:4", "E2107"),
        ("grid.yaml:4:1", "E2102"),
    ]


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    with pytest.raises(InvalidFile) as caught:
        parse('"\\e[2Jx": 1\n"\\e[2Jx": 2\n', "grid.yaml")
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2Jx" in str(caught.value)


def test_an_override_replaces_a_value_and_its_place() -> None:
    document = overlaid(
        parse(TEXT, "grid.yaml"), ["learning_rate=2e-3", "checkpoint.every=5", "base.seed=[1]"]
    )
    assert document.data["base"] == {"learning_rate": 2e-3, "revision": "no", "seed": [1]}
    assert document.data["checkpoint"] == {"every": 5}
    assert document.where(("base", "learning_rate")) == "--set base.learning_rate"
    assert document.where(("base", "seed", 0)) == "--set base.seed"
    assert document.where(("checkpoint", "every"), key=True) == "--set checkpoint.every"
    assert document.where(("base", "revision")) == "grid.yaml:6:13"


YAML_LIKE = st.text(alphabet=st.sampled_from("ab:-[]{}!&*#'\"%\n\t ,|>?1.~é\x07"), max_size=40)


@given(YAML_LIKE | st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        data = parse(text, "grid.yaml").data
    except InvalidFile as error:
        data = {"refused": len(error.problems)}
    assert isinstance(data, dict)
    assert data.get("refused") != 0
