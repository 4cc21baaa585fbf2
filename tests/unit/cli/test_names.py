"""What commands are given: names of sweeps and runs, stores; and the program itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import CAT, R0, R1, Orchestrate

from orchestrator.cli import main
from orchestrator.grid.submission import submit
from storage.directory import DirectoryStore


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "cta"),
        ("resume", "cta"),
        ("cancel", "cta/0", "-y"),
        ("why", "cta/0"),
        ("logs", "cta/0"),
        ("export", "cta/0"),
        ("export", "cta", "--best"),
    ],
)
def test_an_unknown_sweep_is_exit_4_with_a_suggestion_and_changes_nothing(
    arguments: tuple[str, ...], orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    before = [info.key for info in store.list("")]

    assert orchestrate(*arguments) == (
        4,
        "",
        f"no sweep 'cta' in {store.url} — did you mean 'cat'?\n",
    )
    assert [info.key for info in store.list("")] == before


@pytest.mark.parametrize("command", [("resume",), ("status",), ("cancel", "-y"), ("why",)])
def test_a_store_that_is_not_there_is_not_made_by_asking(
    command: tuple[str, ...], orchestrate: Orchestrate, folder: Path
) -> None:
    code, printed, said = orchestrate(command[0], "cat", *command[1:])

    assert (code, printed) == (4, "")
    kind = {"why": "run", "cancel": "sweep or run"}.get(command[0], "sweep")
    assert said == f"no {kind} 'cat' in file://{folder}/store — the store has no sweeps\n"
    assert not (folder / "store").exists()


def test_a_name_that_several_runs_share_is_exit_4_with_all_of_them(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)

    for command in ("why", "logs", "export"):
        assert orchestrate(command, "cat") == (4, "", f"'cat' could be run {R0}, {R1} — write more of it\n")


def test_a_bad_store_url_is_a_usage_error(orchestrate: Orchestrate) -> None:
    code, _, said = orchestrate("status", "cat", "--store", "ftp://host/x")

    assert code == 2
    assert "E2121 store url with scheme 'ftp': use a path" in said


def test_the_program_and_the_module_are_the_same_command(folder: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "orchestrator", "status", "nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )

    assert (shown.returncode, shown.stdout) == (4, "")
    assert shown.stderr == f"no sweep 'nothing' in file://{folder}/store — the store has no sweeps\n"


def test_every_command_has_its_help(orchestrate: Orchestrate) -> None:
    code, printed, _ = orchestrate("-h")
    assert code == 0
    for name in main.commands:
        assert f"  {name} " in printed
        assert orchestrate(name, "--help")[0] == 0
