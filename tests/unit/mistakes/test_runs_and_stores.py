"""What people get wrong in the blocks of a run and of the store: named at its place, nothing is launched."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from support.mistakes import (
    GOOD,
    Case,
    added,
    assert_named_at_its_place,
    based,
    by_number,
    changed,
    searched,
    valued,
)

from orchestrator.cli import main
from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import validate

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
    Case(
        "58",
        based("tokens: [{token: hf_hunter2hunter2hunter2}]"),
        "4:45",
        "E2120",
        "looks like a secret",
    ),
    Case("58", added("storage: {token: hunter2hunter2}"), "6:18", "E2120", "looks like a secret"),
]


@pytest.mark.parametrize("case", [*TRAINING, *STORAGE], ids=by_number)
def test_a_mistake_is_named_at_its_place(case: Case, tmp_path: Path) -> None:
    assert_named_at_its_place(case, tmp_path)


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
