"""The command line: what it prints, what it exits with, and that it launches nothing when it should not.

No Ray here: a command that would start a cluster fails its test.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from support.fake_cluster import small_sweep
from support.light_trainer import save
from support.runs import claimed, committed, ended, incarnation

from orchestrator.cli import main
from orchestrator.commands.session import EXIT_DETACHED, EXIT_RUNS_FAILED
from orchestrator.grid.schema import Metric
from orchestrator.grid.submission import load_submitted, submit
from orchestrator.grid.sweep import Sweep
from orchestrator.usual_store import store_flag
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.local import read_checkpoint
from storage.log import run_log
from storage.records import (
    EndReason,
    Finished,
    Outcome,
    Record,
    Started,
)

CAT = small_sweep(runs=2, name="cat", metric=Metric(name="val/loss"))
R0, R1 = (run.run_id for run in CAT.runs)

GRID = """\
name: tabby
parameters:
  learning_rate: {values: [1e-4, 2e-4]}
base: {model: owner/model, revision: abc, resolution: 32, max_train_steps: 300}
dataset: {path: data}
resources: {gpus: 0}
storage: {url: file://./store}
"""

Orchestrate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: an empty store, a sweep file with its data, and no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ORCHESTRATE_STORE", "file://./store")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("orchestrator.on_ray.local_ray.start", started_a_cluster)
    monkeypatch.setattr("orchestrator.on_ray.local_ray.connect", started_a_cluster)
    (tmp_path / "data").mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "data" / f"{index}.png")
        (tmp_path / "data" / f"{index}.txt").write_text("a cat")
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def started_a_cluster(*arguments: object) -> None:
    raise AssertionError("a Ray cluster was started or asked for")


@pytest.fixture
def orchestrate(folder: Path) -> Orchestrate:
    """Run a command; returns its exit code, what it printed, and what it said."""

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def store(folder: Path) -> DirectoryStore:
    return DirectoryStore(folder / "store")


def lived(store: DirectoryStore, run_id: str, *history: Record) -> None:
    log = run_log(store, run_id)
    for record in history:
        log.append(record)


def succeeded(loss: float, steps: int = 6) -> tuple[Record, ...]:
    return (
        claimed(),
        Started(attempt=1, step=0, at=1.5),
        committed(steps, metrics={"train/loss": 0.5, "val/loss": loss}, final=True),
        Finished(outcome=Outcome.SUCCEEDED, step=steps, at=5.0),
    )


FAILED = (claimed(), Finished(outcome=Outcome.FAILED, detail="BadInput: no images", step=0, at=5.0))


def kinds(store: DirectoryStore, run_id: str) -> list[str]:
    log = run_log(store, run_id)
    log.refresh()
    return [entry.record.kind for entry in log.entries()]


def tabby(folder: Path, store: DirectoryStore) -> Sweep:
    """Submit the folder's sweep file, as ``sweep`` does before it starts anything."""
    from orchestrator.grid.sweep import load

    planned = load(folder / "grid.yaml")
    submit(planned, store)
    return planned


# validate, sweep


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


# names


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


# status, why, logs


def test_status_as_json_is_one_stable_object(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat", "-o", "json")

    assert (code, said) == (0, "")
    told = json.loads(printed)
    assert {key: told[key] for key in ("schema", "sweep", "metric", "goal", "best")} == {
        "schema": 1,
        "sweep": "cat",
        "metric": "val/loss",
        "goal": "minimize",
        "best": R0,
    }
    assert [(row["run"], row["status"], row["step"]) for row in told["runs"]] == [
        (R0, "SUCCEEDED", 6),
        (R1, "PENDING", 0),
    ]


def test_status_off_a_terminal_cuts_nothing_off(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat")

    assert (code, said) == (0, "")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "RUN PARAMS STATUS STEP % LOSS VAL/LOSS ATTEMPTS LOST LAST-CKPT NODE"
    assert lines[1].startswith(f"{R0} ★ seed=0 SUCCEEDED 6/6 100 0.5000 0.5000 1 0 ")
    assert lines[2] == f"{R1} seed=1 PENDING 0/6 0 0 0"
    assert "…" not in printed


def test_watching_a_sweep_that_is_over_returns_at_once(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    for run_id in (R0, R1):
        lived(store, run_id, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat", "-w")

    assert code == 0
    assert said.splitlines() == [f"{run_id}: SUCCEEDED step 6/6" for run_id in (R0, R1)]
    assert len(printed.splitlines()) == 3


def test_ctrl_c_while_watching_detaches_and_says_what_next(
    orchestrate: Orchestrate, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(CAT, store)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.reports.watch.time.sleep", interrupted)

    code, printed, said = orchestrate("status", "cat", "-w")

    assert (code, printed) == (EXIT_DETACHED, "")
    assert said.splitlines()[-5:] == [
        "Detached. The sweep goes on.",
        "  orchestrate status cat -w     watch it again",
        "  orchestrate explain cat/0     why a run waits, or is where it is",
        "  orchestrate why cat/0         why a run was interrupted",
        "  orchestrate cancel cat        stop it; checkpoints stay",
    ]

    monkeypatch.delenv("ORCHESTRATE_STORE")
    _, _, said = orchestrate("status", "cat", "-w", "--store", "file://./store")
    flag = f"--store {store.url}"
    assert said.splitlines()[-4:] == [
        f"  orchestrate status cat -w {flag}     watch it again",
        f"  orchestrate explain cat/0 {flag}     why a run waits, or is where it is",
        f"  orchestrate why cat/0 {flag}         why a run was interrupted",
        f"  orchestrate cancel cat {flag}        stop it; checkpoints stay",
    ]


def test_a_store_in_a_hint_is_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://bucket/loras?endpoint=http://127.0.0.1:9000&region=eu"
    monkeypatch.setenv("ORCHESTRATE_STORE", "ftp://no/store")
    assert store_flag(url) == f" --store '{url}'"
    monkeypatch.setenv("ORCHESTRATE_STORE", url)
    assert store_flag(url) == ""


def test_why_tells_what_an_interruption_cost(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lost = ended(1, EndReason.NODE_LOST).model_copy(update={"step": 5, "step_s": 2.0, "at": 0.0})
    lived(store, R0, claimed(), Started(attempt=1, step=0, at=0.0), committed(4), lost)

    code, printed, said = orchestrate("why", "cat/0")

    first, second = printed.splitlines()
    assert (code, said) == (0, "")
    assert first == f"{R0}: Interrupted once; waiting for a slot, step 4 of 6 committed."
    assert second.endswith("node n1 was lost (no notice): reached step 5, lost 1 step = 2.0 s.")


def test_why_with_the_timeline_tells_every_record(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, _ = orchestrate("why", R0, "--timeline")

    lines = printed.splitlines()
    assert (code, lines[0]) == (0, f"{R0}: Never interrupted; SUCCEEDED at step 6 of 6.")
    assert [line.split("  ", 1)[1] for line in lines[1:]] == [
        "attempt 1 placed on n1",
        "attempt 1 training, from step 0",
        "step 6 committed by attempt 1, 0.00 MB (final)",
        "SUCCEEDED at step 6",
    ]


def ship(store: DirectoryStore, run_id: str, attempt: int, *batches: str) -> None:
    for n, text in enumerate(batches):
        store.put(layout.log_text_key(run_id, attempt, n), text.encode())


def test_logs_are_those_of_the_newest_attempt_that_wrote_any(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    ship(store, R0, 1, "old\n")
    ship(store, R0, 2, "one\ntwo\n", "three\nfour\n", "five\n")
    store.put(layout.events_key(R0, 2, 0), b'{"event": "step"}\n')

    assert orchestrate("logs", "cat/0") == (0, "one\ntwo\nthree\nfour\nfive\n", "")
    assert orchestrate("logs", "cat/0", "-n", "2") == (0, "four\nfive\n", "")
    assert orchestrate("logs", "cat/0", "-n", "0", "--attempt", "1") == (0, "old\n", "")
    assert orchestrate("logs", "cat/0", "--events") == (0, '{"event": "step"}\n', "")


def test_logs_that_are_not_there_are_exit_4_with_those_that_are(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    ship(store, R0, 1, "old\n")
    ship(store, R0, 3, "new\n")

    said = f"attempt 2 of {R0} has written nothing; these have: 1, 3\n"
    assert orchestrate("logs", "cat/0", "--attempt", "2") == (4, "", said)
    assert orchestrate("logs", "cat/1") == (4, "", f"no attempt of {R1} has written anything yet\n")
    assert orchestrate("logs", "cat/0", "--attempt", "0")[0] == 2


# cancel


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


# export


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


# the program itself


def test_the_program_and_the_module_are_the_same_command(folder: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "orchestrator", "status", "nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )

    assert (shown.returncode, shown.stdout) == (4, "")
    assert shown.stderr == f"no sweep 'nothing' in file://{folder}/store — the store has no sweeps\n"


def test_every_command_has_its_help(orchestrate: Orchestrate) -> None:
    code, printed, _ = orchestrate("-h")
    assert code == 0
    for name in main.commands:
        assert f"  {name} " in printed
        assert orchestrate(name, "--help")[0] == 0


def test_a_submitted_sweep_needs_its_file_no_more(
    orchestrate: Orchestrate, folder: Path, store: DirectoryStore
) -> None:
    planned = tabby(folder, store)
    (folder / "grid.yaml").unlink()

    assert load_submitted(store, "tabby") == planned
    assert orchestrate("status", "tabby", "-o", "json")[0] == 0
