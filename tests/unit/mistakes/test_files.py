"""What people get wrong in a sweep file as a file: it is named at its place."""

from pathlib import Path

import pytest
from support.mistakes import GOOD, Case, added, assert_named_at_its_place, based, by_number, searched

from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import load, validate

ALIAS_BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefg", "bcdefgh", strict=True)
)

FILE = [
    Case("3", "", "1:1", "E2109", "the file is empty — begin with 'method: grid'"),
    Case("3", "# nothing yet\n", "1:1", "E2109", "the file is empty"),
    Case(
        "4",
        GOOD.encode() + b"description: caf\xe9\n",
        "6:17",
        "E2102",
        "not UTF-8: byte 0xe9 — save it as UTF-8",
    ),
    Case("5", "method: grid\nbase:\n\tmodel: owner/model\n", "3:1", "E2105", "a tab is used as indentation"),
    Case("6", added("method: grid"), "6:1", "E2106", "key 'method' is given twice, first at FILE:1:1"),
    Case("6", based("network_dim: 4, rank: 8"), "4:28", "E2106", "'network_dim' is another name of 'rank'"),
    Case(
        "6",
        searched("base.learning_rate: {value: 1}"),
        "4:3",
        "E2106",
        "is the same as parameters.learning_rate",
    ),
    Case("7", added("resorces: {gpus: 1}"), "6:1", "E2103", "'resorces' — did you mean 'resources'?"),
    Case("7", added("resources: {gpu: 1}"), "6:13", "E2103", "'gpu' in resources — did you mean 'gpus'?"),
    Case(
        "7",
        based("learning_rat: 1"),
        "4:28",
        "E2103",
        "'learning_rat' in base — did you mean 'learning_rate'?",
    ),
    Case("7", based("network_dims: 1"), "4:28", "E2103", "in base — did you mean 'network_dim'?"),
    Case(
        "7",
        searched("learning_rat: {value: 1}"),
        "4:3",
        "E2103",
        "in parameters — did you mean 'learning_rate'?",
    ),
    Case(
        "7", searched("dataset.flip: {value: 1}"), "4:3", "E2103", "unknown key 'dataset.flip' in parameters"
    ),
    Case(
        "7",
        added("storage: {url: ./s, endpoint_url: x}"),
        "6:21",
        "E2103",
        "everything about the store is in its url",
    ),
    Case(
        "7", added("early_terminate: {type: hyperband}"), "6:1", "E2124", "is not supported by this version"
    ),
    Case("7", added("track: [wandb]"), "6:1", "E2124", "orchestrate track NAME --to tensorboard, or wandb"),
    Case("8", added("name: !!python/object:os.system x"), "6:7", "E2107", "tag '!!python/object:os.system'"),
    Case(
        "8", added("resources: !gpu {gpus: 1}"), "6:12", "E2107", "tag '!gpu' is not allowed — remove the tag"
    ),
    Case("9", ALIAS_BOMB, "1:8", "E2108", "there are more than 50000 values — use fewer aliases (*name)"),
    Case("9", "a: &a [*a]\n", "1:4", "E2108", "values are nested deeper than 20 levels"),
    Case("9", "a: " + "[" * 21 + "]" * 21, "1:24", "E2108", "values are nested deeper than 20 levels"),
    Case("9", "[" * 200_000, "1:22", "E2108", "values are nested deeper than 20 levels"),
    Case("10", GOOD + "#" * 256 * 1024, "", "E2108", "the file is larger than 256 KB"),
    Case("11", "- method: grid\n", "1:1", "E2109", "the file is a list, expected 'key: value' lines"),
    Case("11", "grid\n", "1:1", "E2109", "the file is a single value"),
    Case("12", added("---\nmethod: grid"), "6:1", "E2109", "the file holds several documents"),
    Case(
        "13", added("version: 2"), "6:10", "E2112", "version 2 is newer than what this orchestrate reads, 1"
    ),
    Case("13", added("version: 0"), "6:10", "E2112", "version 0 is not what this orchestrate reads"),
    Case("14", '[base]\nmodel = "x"\nrank = 8\n', "1:1", "E2109", "this is TOML, expected YAML"),
    Case("-", added("description: a: b"), "6:15", "E2102", "a second ':' on the line — put text that holds"),
    Case("-", added("1: x"), "6:1", "E2102", "a key must be text — put it into quotes"),
    Case("-", added("<<: {method: grid}"), "6:1", "E2102", "YAML 1.2 has no merge keys"),
    Case("-", added("description: \x07"), "1:1", "E2102", "special characters are not allowed"),
    Case("-", added('description: "\\ud83d"'), "6:14", "E2102", "cannot be read"),
    Case(
        "-",
        added("name: My Sweep"),
        "6:7",
        "E2111",
        "name must match ^[a-z0-9][a-z0-9-]{0,39}$, got 'My Sweep'",
    ),
    Case("-", added("name: 12"), "6:7", "E2111", "name must be text, got 12 — put it into quotes"),
]


@pytest.mark.parametrize("case", FILE, ids=by_number)
def test_a_mistake_is_named_at_its_place(case: Case, tmp_path: Path) -> None:
    assert_named_at_its_place(case, tmp_path)


def test_the_file_that_the_mistakes_are_made_in_is_right(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GOOD)
    assert len(validate(file).cells) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.yaml", "there is no such file"), ("", "this is a folder, expected a sweep file")],
    ids=["1-missing", "2-folder"],
)
def test_a_path_that_is_no_file_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=f"^{tmp_path / name} E2101 {message}"):
        load(tmp_path / name)


def test_a_toml_file_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "kohya.toml").write_text("# nothing\n")
    with pytest.raises(InvalidFile, match="this is TOML, expected YAML"):
        load(tmp_path / "kohya.toml")
