"""``cancel`` and ``export`` without a controller."""

from pathlib import Path

import pytest
from support.command_line import CAT, FAILED, R0, R1, Orchestrate, succeeded
from support.light_trainer import save
from support.runs import claimed, incarnation, lived
from support.sweeps import records

from orchestrator.grid.submission import submit
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.local import read_checkpoint
from storage.log import run_log


def kinds(store: DirectoryStore, run_id: str) -> list[str]:
    return [record.kind for record in records(store, run_id)]


def test_cancelling_without_a_controller_ends_what_waits_and_marks_what_runs(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    lived(store, R0, claimed())

    code, printed, said = orchestrate("cancel", "cat", "-y")

    assert (code, said) == (0, "")
    assert printed.splitlines() == [
        f"{R0}: CANCELLING: no controller was found, the next one that works on it stops it",
        f"{R1}: CANCELLED",
    ]
    assert kinds(store, R0) == ["claimed", "cancel_requested"]
    assert kinds(store, R1) == ["cancel_requested", "finished"]


def test_cancelling_one_run_leaves_the_others(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)

    assert orchestrate("cancel", "cat/1", "-y") == (0, f"{R1}: CANCELLED\n", "")
    assert kinds(store, R0) == []


def test_cancelling_what_is_over_changes_nothing_and_says_so(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))
    lived(store, R1, *FAILED)
    before = [kinds(store, run_id) for run_id in (R0, R1)]

    assert orchestrate("cancel", "cat", "-y") == (0, f"{R0}: SUCCEEDED\n{R1}: FAILED\n", "")
    assert [kinds(store, run_id) for run_id in (R0, R1)] == before


def with_checkpoint(store: DirectoryStore, folder: Path, step: int) -> None:
    """Give a run a real checkpoint, which no export could use."""
    log = run_log(store, R0)
    log.append(claimed())
    save(folder / "local", step, final=False)
    local = read_checkpoint(folder / "local" / f"step-{step:09d}")
    assert local is not None
    CheckpointStore(store, R0, log).publish(local, 1, incarnation(1))


def test_exporting_a_step_that_is_not_there_is_exit_4_with_those_that_are(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    submit(CAT, store)
    with_checkpoint(store, folder, 5)

    said = f"run {R0} has no checkpoint of step 123; there are: 5\n"
    assert orchestrate("export", "cat/0", "--step", "123") == (4, "", said)
    assert not (folder / "exports").exists()


def test_exporting_a_run_without_a_checkpoint_is_exit_4(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    submit(CAT, store)

    said = f"{R1} has no checkpoint yet: export it after its first commit\n"
    assert orchestrate("export", "cat/1") == (4, "", said)
    assert orchestrate("export", "cat", "--best") == (
        4,
        "",
        "cat: no run that succeeded reports the sweep's metric\n",
    )


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_export_that_is_there_is_not_written_over_without_force(
    form: str, orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    submit(CAT, store)
    with_checkpoint(store, folder, 5)
    target = Path("exports") / f"{R0}-step00000005-{form}"
    target.mkdir(parents=True)
    (target / "mine").write_text("precious")

    code, printed, said = orchestrate("export", "cat/0", "--to", form)

    assert (code, printed) == (2, "")
    assert f"E2701 {target} is there already — give --force to write over it, or another --out" in said
    assert (target / "mine").read_text() == "precious"
