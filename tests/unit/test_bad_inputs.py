"""What people get wrong in a sweep file: each gives its message, at its place, and launches nothing."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import load, validate

GOOD = """\
method: grid
parameters:
  learning_rate: {values: [5e-5, 1e-4]}
base: {model: owner/model}
dataset: {path: data}
"""


@dataclass(frozen=True)
class Case:
    """One mistake, by its number in the list of faults."""

    number: str
    text: str | bytes
    place: str
    """Line and column."""
    code: str
    message: str
    """What the printed line contains after the code."""


def added(line: str) -> str:
    """The good file with something after its last line: on line 6."""
    return f"{GOOD}{line}\n"


def changed(old: str, new: str) -> str:
    """The good file with one text replaced."""
    assert old in GOOD
    return GOOD.replace(old, new)


def searched(parameter: str) -> str:
    """The good file with another line of parameters, on line 4."""
    return changed("base:", f"  {parameter}\nbase:")


def valued(values: str) -> str:
    """The good file with other values of the learning rate, on line 3 from column 18."""
    return changed("{values: [5e-5, 1e-4]}", values)


def based(entry: str) -> str:
    """The good file with one more key of base, on line 4 from column 28."""
    return changed("owner/model}", f"owner/model, {entry}}}")


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

SEARCH = [
    Case(
        "15",
        changed("parameters:\n  learning_rate: {values: [5e-5, 1e-4]}\n", ""),
        "1:1",
        "E2104",
        "parameters is missing",
    ),
    Case(
        "15",
        changed("\n  learning_rate: {values: [5e-5, 1e-4]}", " {}"),
        "2:1",
        "E2104",
        "parameters is empty",
    ),
    Case(
        "15",
        changed("\n  learning_rate: {values: [5e-5, 1e-4]}", ""),
        "2:1",
        "E2111",
        "parameters must be a block",
    ),
    Case(
        "16",
        valued("{values: 1e-4}"),
        "3:27",
        "E2110",
        "'values: 1e-4' must be a list — write values: [1e-4]",
    ),
    Case("16", valued("[5e-5, 1e-4]"), "3:18", "E2114", "write learning_rate: {values: [5e-5, 1e-4]}"),
    Case("16", valued("1e-4"), "3:18", "E2114", "write learning_rate: {value: 1e-4}"),
    Case("17", valued("{values: []}"), "3:27", "E2114", "parameters.learning_rate.values is empty"),
    Case("18", valued("{values: [1e-4, 5e-5, 0.0001]}"), "3:40", "E2115", "lists 0.0001 twice"),
    Case("19", valued("{min: 1e-5, max: 1e-3}"), "3:19", "E2114", "'min' is for random and bayes search"),
    Case("19", valued("{}"), "3:18", "E2114", "has neither 'value' nor 'values'"),
    Case("20", changed("grid", "random"), "1:9", "E2113", "method 'random' is not supported: grid is what"),
    Case("21", changed("grid", "bayes"), "1:9", "E2113", "write method: grid and list the values"),
    Case("23", changed("grid", "gird"), "1:9", "E2113", "unknown method 'gird' — did you mean 'grid'?"),
    Case(
        "23",
        valued("{distribution: log_unifrom}"),
        "3:19",
        "E2114",
        "'distribution' is for random and bayes search",
    ),
    Case(
        "24", valued("{values: [1], value: 1}"), "3:19", "E2114", "has both 'value' and 'values' — keep one"
    ),
    Case("24", valued("{values: [1], min: 1}"), "3:32", "E2114", "'min' is for random and bayes search"),
    Case(
        "-",
        valued("{vals: [1]}"),
        "3:19",
        "E2103",
        "'vals' in parameters.learning_rate — did you mean 'values'?",
    ),
    Case(
        "25",
        changed("[5e-5, 1e-4]}", f"{list(range(1, 102))}}}\n  seed: {{values: {list(range(100))}}}"),
        "2:1",
        "E2116",
        "the parameters make 10100 runs (101 x 100), more than 10000",
    ),
    Case(
        "26",
        added("include: [{rank: 4, learning_rate: 1}]"),
        "6:12",
        "E2117",
        "names 'rank', which is not among",
    ),
    Case("26", added("exclude: [{learn_rate: 1}]"), "6:12", "E2117", "— did you mean 'learning_rate'?"),
    Case(
        "26",
        added("exclude: [{learning_rate: 5e-5}, {learning_rate: 1e-4}]"),
        "6:1",
        "E2117",
        "removes every run",
    ),
    Case("26", added("exclude: [{learning_rate: 3e-5}]"), "6:11", "E2117", "exclude[0] matches no run"),
    Case("26", added("exclude: [{}]"), "6:11", "E2117", "exclude[0] is empty"),
    Case(
        "26",
        searched("rank: {values: [4, 8]}") + "include: [{rank: 4}]\n",
        "7:11",
        "E2117",
        "does not say learning_rate",
    ),
    Case(
        "18",
        added("include: [{learning_rate: 5e-5}]"),
        "6:11",
        "E2115",
        "include[0] is the same run as one of parameters",
    ),
    Case("27", searched('rank: {value: "${parameters.alpha}"}'), "4:17", "E2118", "names no parameter"),
    Case(
        "27",
        searched('rank: {value: "${parameters.learning_rat}"}'),
        "4:17",
        "E2118",
        "did you mean 'learning_rate'?",
    ),
    Case("27", searched('rank: {value: "${parameters.rank}"}'), "4:17", "E2118", "is itself a reference"),
    Case(
        "27",
        searched('rank: {value: "${rank}"}'),
        "4:17",
        "E2118",
        "refers to nothing — write ${parameters.NAME}",
    ),
    Case(
        "28",
        added("metric: {name: val/los, goal: minimize}"),
        "6:16",
        "E2119",
        "'val/los' — did you mean 'val/loss'?",
    ),
    Case("28", added("metric: {name: accuracy}"), "6:16", "E2119", "or add an evaluate command"),
    Case(
        "28",
        added("metric: {name: val/loss}").replace("data}", "data, val_fraction: 0}"),
        "6:16",
        "E2119",
        "is 0",
    ),
    Case(
        "29", added("metric: {goal: minimise}"), "6:16", "E2111", "got 'minimise' — did you mean 'minimize'?"
    ),
    Case("30", added("early_terminate: {min_iter: 300}"), "6:1", "E2124", "remove it"),
    Case(
        "31", based("learning_rate: fast"), "4:43", "E2111", "base.learning_rate must be a number, got 'fast'"
    ),
]

TRAINING = [
    Case(
        "32",
        valued("{values: [1e-4, fast]}"),
        "3:34",
        "E2111",
        "learning_rate.values[1] must be a number, got 'fast'",
    ),
    Case("32", valued("{value: -1e-4}"), "3:26", "E2111", "must be greater than 0, got -1e-4"),
    Case("32", valued("{value: 0}"), "3:26", "E2111", "must be greater than 0"),
    Case("32", valued("{value: .inf}"), "3:26", "E2111", "must be a finite number"),
    Case("33", based("rank: 0"), "4:34", "E2111", "base.rank must be at least 1, got 0"),
    Case("33", based("rank: 1.5"), "4:34", "E2111", "base.rank must be a whole number, got 1.5"),
    Case("33", based("rank: true"), "4:34", "E2111", "base.rank must be a whole number, got true"),
    Case(
        "33", based("network_dim: 2000"), "4:41", "E2111", "base.network_dim must be at most 1024, got 2000"
    ),
    Case("34", based("resolution: 500"), "4:40", "E2111", "base.resolution must be a multiple of 8, got 500"),
    Case(
        "35", based("train_batch_size: 0"), "4:46", "E2111", "base.train_batch_size must be at least 1, got 0"
    ),
    Case(
        "38",
        based("optimizer: adam"),
        "4:39",
        "E2111",
        "'prodigy' or 'lion', got 'adam' — did you mean 'adamw'?",
    ),
    Case("-", added("resources: {gpus: 1.5}"), "6:19", "E2111", "or below 1 to share a GPU, got 1.5"),
    Case("-", added("resources: {gpus: 2}"), "6:19", "E2111", "a step has 1 image(s) to share among them"),
    Case("38", based("lr_scheduler: cosin"), "4:42", "E2111", "— did you mean 'cosine'?"),
    Case("-", based("lr_warmup_steps: 1000"), "4:45", "E2111", "base.lr_warmup_steps (1000) must be below"),
    Case(
        "-",
        based("revision: 12345"),
        "4:38",
        "E2111",
        "base.revision must be text, got 12345 — put it into quotes",
    ),
    Case(
        "-", based("targets: to_q"), "4:37", "E2110", "'targets: to_q' must be a list — write targets: [to_q]"
    ),
    Case(
        "-", changed("base: {model: owner/model}", "base: {rank: 8}"), "4:7", "E2104", "base.model is missing"
    ),
    Case("-", changed("dataset: {path: data}\n", ""), "1:1", "E2104", "dataset.path is missing"),
    Case(
        "48",
        changed("data}", "data, val_fraction: 1}"),
        "5:37",
        "E2111",
        "dataset.val_fraction must be less than 1",
    ),
    Case("-", added("evaluate: {command: [x]}"), "6:11", "E2111", "there is no samples block"),
    Case(
        "-",
        added("evaluate: {command: x}\nsamples: {prompts: [a]}"),
        "6:21",
        "E2110",
        "'command: x' must be a list",
    ),
    Case("-", added("samples: {prompts: []}"), "6:20", "E2111", "samples.prompts must not be empty"),
    Case(
        "-",
        added("checkpoint: {every: often}"),
        "6:21",
        "E2111",
        "must be steps (200), a time ('120s', '5m', '1h') or 'auto', got 'often'",
    ),
    Case("-", added("checkpoint: {every: 0}"), "6:21", "E2111", "checkpoint.every must be at least 1, got 0"),
    Case(
        "-",
        added("checkpoint: {keep_last: 0}"),
        "6:25",
        "E2111",
        "checkpoint.keep_last must be at least 1, got 0",
    ),
]

STORAGE = [
    Case("50", added("storage: {url: ftp://host/x}"), "6:16", "E2121", "store url with scheme 'ftp'"),
    Case("50", added("storage: {url: s3:///prefix}"), "6:16", "E2121", "the bucket's name is missing"),
    Case("50", added("storage: {url: memory://x}"), "6:16", "E2121", "memory:// lives in one process only"),
    Case(
        "58", added("storage: {url: 's3://AKIAIOSFODNN7EXAMPLE@b/p'}"), "6:16", "E2120", "looks like a secret"
    ),
    Case(
        "58",
        added("storage: {url: 's3://b?endpoint=http://me:hunter2@h'}"),
        "6:16",
        "E2120",
        "in the environment",
    ),
    Case(
        "58", based("hf_token: hunter2hunter2"), "4:38", "E2120", "'hf_token' holds what looks like a secret"
    ),
    Case("58", added("description: hf_hunter2hunter2hunter2"), "6:14", "E2120", "looks like a secret"),
]


@pytest.mark.parametrize(
    "case", [*FILE, *SEARCH, *TRAINING, *STORAGE], ids=lambda case: f"{case.number}-{case.code}-{case.place}"
)
def test_a_mistake_is_named_at_its_place(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())

    with pytest.raises(InvalidFile) as caught:
        validate(file)

    assert caught.value.exit_code == 2
    text = str(caught.value)
    place = f"{file}:{case.place}" if case.place else str(file)
    lines = [line for line in text.splitlines() if line.startswith(f"{place} {case.code} ")]
    assert len(lines) == 1, text
    assert case.message.replace("FILE", str(file)) in lines[0]
    assert text.splitlines()[-1] == "1 error."
    assert "hunter2" not in text
    assert "AKIA" not in text


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


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(
        "parameters:\n"
        "  learning_rat: {values: [5e-5]}\n"
        "  rank: {values: 8}\n"
        "  seed: {values: [1, one]}\n"
        "base: {model: owner/model, optimzer: adamw, resolution: 10}\n"
        "dataset: {path: data, val_fraction: 2}\n"
        "checkpoint: {keep_lst: 3}\n"
        "storage: {url: ftp://x}\n"
    )

    with pytest.raises(InvalidFile) as caught:
        validate(file)

    places = [(problem.where or "").removeprefix(f"{file}:") for problem in caught.value.problems]
    assert places == ["2:3", "3:18", "4:22", "5:28", "5:57", "6:37", "7:14", "8:16"]
    assert str(caught.value).endswith("\n8 errors.")


def test_a_circle_of_references_is_named_at_each_link(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(searched('rank: {value: "${parameters.alpha}"}\n  alpha: {value: "${parameters.rank}"}'))
    with pytest.raises(InvalidFile) as caught:
        validate(file)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("E2118", f"{file}:4:17"),
        ("E2118", f"{file}:5:18"),
    ]


@pytest.mark.parametrize(
    ("command", "verdict"), [("validate", "2 errors."), ("sweep", "2 errors. Nothing was launched.")]
)
def test_the_command_line_says_it_and_launches_nothing(
    command: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(searched("learning_rat: {values: 1e-4}") + "versoin: 1\n")

    result = CliRunner().invoke(main, [command, "grid.yaml"])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "grid.yaml:4:3 E2103 unknown key 'learning_rat' in parameters — did you mean 'learning_rate'?\n"
        "grid.yaml:7:1 E2103 unknown key 'versoin' — did you mean 'version'?\n"
        f"{verdict}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank", "--set E2123 'rank' is not KEY=VALUE"),
        ("rank=0", "--set base.rank E2111 base.rank must be at least 1, got 0"),
        ("rnk=0", "--set rnk E2103 unknown key 'rnk'"),
        ("base.model.x=1", "--set base.model.x E2123 'model' is not a block of keys"),
        ("learning_rate=1", "--set base.learning_rate E2123 'learning_rate' is a parameter of the sweep"),
        ("checkpoint.every=[", "--set checkpoint.every:1:2 E2102 not YAML"),
        ("storage.token=hunter2", "--set storage.token"),
    ],
)
def test_a_bad_override_is_shown_at_its_option(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GOOD)
    with pytest.raises(InvalidFile) as caught:
        validate(file, overrides=[override])
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)
