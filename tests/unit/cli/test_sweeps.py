"""``validate``, ``sweep`` and ``resume``: nothing is launched when it should not be."""

from pathlib import Path

import pytest
from PIL import Image
from support.command_line import CAT, FAILED, GRID, R0, R1, Orchestrate, succeeded
from support.runs import lived

from orchestrator.commands.session import EXIT_RUNS_FAILED
from orchestrator.grid.submission import load_submitted, submit
from orchestrator.grid.sweep import Sweep
from storage.directory import DirectoryStore


def tabby(folder: Path, store: DirectoryStore) -> Sweep:
    """Submit the folder's sweep file, as ``sweep`` does before it starts anything."""
    from orchestrator.grid.sweep import load

    planned = load(folder / "grid.yaml")
    submit(planned, store)
    return planned


def test_validate_counts_the_runs_and_looks_at_nothing(orchestrate: Orchestrate, folder: Path) -> None:
    (folder / "data").rename(folder / "elsewhere")

    assert orchestrate("validate", "grid.yaml") == (0, "grid.yaml: no mistakes; sweep tabby, 2 runs\n", "")
    assert orchestrate("validate", "grid.yaml", "--set", "run_cap=1")[:2] == (
        0,
        "grid.yaml: no mistakes; sweep tabby, 1 run\n",
    )
    assert not (folder / "store").exists()


def test_validate_all_looks_at_what_the_file_names_and_stores_nothing(
    orchestrate: Orchestrate, folder: Path
) -> None:
    code, printed, said = orchestrate("validate", "grid.yaml", "--all")
    assert (code, printed) == (0, "grid.yaml: no mistakes; sweep tabby, 2 runs\n")
    assert said.startswith(f"dataset {folder / 'data'}: ")
    (folder / "data").rename(folder / "elsewhere")

    code, _, said = orchestrate("validate", "grid.yaml", "--all")

    assert (code, "E2201" in said) == (3, True)
    assert not (folder / "store" / "sweeps").exists()


def test_a_dry_run_shows_every_run_whole_and_launches_nothing(orchestrate: Orchestrate, folder: Path) -> None:
    code, printed, said = orchestrate("sweep", "grid.yaml", "--dry-run", "--name", "other")

    data, *lines = said.splitlines()
    assert (code, printed) == (0, "")
    assert data.startswith(f"dataset {folder / 'data'}: ")
    assert lines[0].split() == ["RUN", "PARAMS", "STEPS"]
    assert [line.split()[1:] for line in lines[1:3]] == [
        ["learning_rate=0.0001", "300"],
        ["learning_rate=0.0002", "300"],
    ]
    assert all(line.startswith(f"other-00{n}-") for n, line in enumerate(lines[1:3]))
    assert lines[3:] == [f"2 runs; store file://{folder}/store", "Dry run: nothing was launched."]
    assert no_objects(folder)


def no_objects(folder: Path) -> bool:
    return list(DirectoryStore(folder / "store").list("")) == []


@pytest.mark.parametrize(
    ("text", "arguments", "code", "said"),
    [
        pytest.param(
            GRID.replace("dataset:", "datasets:"),
            (),
            2,
            "grid.yaml:5:1 E2103 unknown key 'datasets' — did you mean 'dataset'?",
            id="mistake",
        ),
        pytest.param(
            GRID.replace("path: data", "path: nowhere"),
            (),
            3,
            "E2201 dataset folder {folder}/nowhere does not exist — "
            "relative paths start at the folder of the sweep file",
            id="missing data",
        ),
        pytest.param(GRID, ("--name", "No Such Name"), 2, "E2111 name must match", id="name"),
        pytest.param(GRID, ("--set", "ranks=4"), 2, "--set ranks E2103 unknown key 'ranks'", id="override"),
    ],
)
def test_a_sweep_that_is_wrong_launches_nothing(
    text: str, arguments: tuple[str, ...], code: int, said: str, orchestrate: Orchestrate, folder: Path
) -> None:
    (folder / "grid.yaml").write_text(text)

    found, printed, message = orchestrate("sweep", "grid.yaml", "-y", *arguments)

    assert (found, printed) == (code, ""), message
    assert said.format(folder=folder) in message
    assert message.splitlines()[-1].endswith("Nothing was launched.")
    assert no_objects(folder)


def test_a_sweep_that_the_cluster_cannot_run_is_not_stored(
    orchestrate: Orchestrate, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.on_ray.local_ray.connect", lambda address: None)
    monkeypatch.setattr("orchestrator.on_ray.ray_cluster.shortfall", lambda want: "n1: 1 CPUs, 0 GPUs")

    code, printed, said = orchestrate("sweep", "grid.yaml", "-y", "--address", "127.0.0.1:1")

    assert (code, printed) == (3, "")
    assert "E2602 no node has what a run needs" in said
    assert no_objects(folder)


def test_a_sweep_that_goes_on_waits_for_nodes_that_have_yet_to_join(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tabby(folder, store)
    started: list[str] = []
    monkeypatch.setattr("orchestrator.on_ray.local_ray.connect", lambda address: None)
    monkeypatch.setattr("orchestrator.on_ray.ray_cluster.shortfall", lambda want: "")
    monkeypatch.setattr("orchestrator.on_ray.ray_cluster.machines", lambda: 1)
    monkeypatch.setattr(
        "orchestrator.launching.launch.start", lambda sweep, *_, **__: started.append(sweep.name)
    )

    code, _, said = orchestrate("resume", "tabby", "-d", "--address", "127.0.0.1:1")

    assert (code, started) == (0, ["tabby"])
    assert "no node has what a run needs" in said
    assert "the runs wait for such a node" in said


def test_a_changed_file_under_the_same_name_is_refused_with_the_differences(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    tabby(folder, store)
    before = [info.key for info in store.list("")]
    (folder / "grid.yaml").write_text(GRID.replace("2e-4", "3e-4").replace("300", "400"))
    Image.new("RGB", (8, 8), "red").save(folder / "data" / "0.png")

    code, printed, said = orchestrate("sweep", "grid.yaml", "-y")

    hint = "give the changed file another name, with 'name:' or --name"
    was = "E2190 sweep tabby was submitted before:"
    assert (code, printed) == (2, "")
    for difference in (
        "the run with learning_rate=0.0002 is gone",
        "the run with learning_rate=0.0003 is new",
        "base.max_train_steps: 300 before, 400 now",
        f"the content of dataset {folder}/data has changed",
    ):
        assert f"{was} {difference} — {hint}" in said.splitlines()
    assert [info.key for info in store.list("")] == before


def test_the_same_file_again_shows_that_the_sweep_is_done(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    first, second = tabby(folder, store).runs
    lived(store, first.run_id, *succeeded(0.5, 300))
    lived(store, second.run_id, *succeeded(0.25, 300))

    code, printed, said = orchestrate("sweep", "grid.yaml", "-y")

    assert code == 0
    assert said.splitlines()[-1] == "tabby was submitted before, unchanged."
    assert printed.splitlines()[-1] == f"best by val/loss: {second.run_id} (0.2500)"
    assert sum("SUCCEEDED" in line for line in printed.splitlines()) == 2


@pytest.mark.parametrize("command", [("resume", "tabby"), ("sweep", "grid.yaml", "-y")])
def test_a_sweep_that_was_cancelled_stays_so_and_says_what_to_do(
    command: tuple[str, ...], orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    first, _ = tabby(folder, store).runs
    lived(store, first.run_id, *succeeded(0.5, 300))
    assert orchestrate("cancel", "tabby/1", "-y")[0] == 0

    code, printed, said = orchestrate(*command)

    assert code == 0
    assert "CANCELLED" in printed
    assert said.splitlines()[-1] == (
        "tabby was cancelled (1 of 2 runs) and stays so — "
        "to train them, submit the file under another name, with --name"
    )


def test_a_sweep_that_ended_with_failed_runs_exits_100_and_says_why(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))
    lived(store, R1, *FAILED)

    code, printed, said = orchestrate("resume", "cat")

    assert code == EXIT_RUNS_FAILED == 100
    assert printed.splitlines()[-1] == f"best by val/loss: {R0} (0.5000)"
    assert said == f"run {R1} failed: BadInput: no images\n"


def test_a_submitted_sweep_needs_its_file_no_more(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    planned = tabby(folder, store)
    (folder / "grid.yaml").unlink()

    assert load_submitted(store, "tabby") == planned
    assert orchestrate("status", "tabby", "-o", "json")[0] == 0
