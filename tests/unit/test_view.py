"""What a person sees of a sweep: the status words, the best run, the table, the JSON."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from support.fake_cluster import small_sweep
from support.runs import claimed, committed, ended, finished, state_after

from orchestrator.commands.contact_sheet import CELL, LABEL, MARGIN, contact_sheet
from orchestrator.control.cluster import Work
from orchestrator.grid.schema import Metric
from orchestrator.grid.sweep import Sweep
from orchestrator.reports.view import RunView, Status, as_json, best, described, read_states, rows, status
from orchestrator.reports.watch import Watcher, console, table
from storage.errors import Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import CancelRequested, EndReason, Outcome, Record, Started

R0, R1 = "cat-0-00000000", "cat-1-00000001"
STARTED = Started(attempt=1, step=0, at=1.5)
ASKED = CancelRequested(at=2.0)


@pytest.mark.parametrize(
    ("history", "word"),
    [
        ((), Status.PENDING),
        ((claimed(),), Status.STARTING),
        ((claimed(), STARTED), Status.RUNNING),
        ((claimed(), STARTED, ended()), Status.RECOVERING),
        ((claimed(), ended(), claimed(2)), Status.RECOVERING),
        ((claimed(), ended(), claimed(2), Started(attempt=2, step=0, at=4.0)), Status.RUNNING),
        ((claimed(), STARTED, ASKED), Status.CANCELLING),
        ((claimed(), STARTED, ASKED, ended(1, EndReason.DRAINED)), Status.CANCELLING),
        ((claimed(), committed(6, final=True), finished(Outcome.SUCCEEDED)), Status.SUCCEEDED),
        ((claimed(), finished(Outcome.FAILED)), Status.FAILED),
        ((ASKED, finished(Outcome.CANCELLED)), Status.CANCELLED),
    ],
)
def test_the_word_for_where_a_run_is(history: tuple[Record, ...], word: Status) -> None:
    assert status(state_after(*history)) is word


def test_every_status_is_reached_above() -> None:
    (mark,) = test_the_word_for_where_a_run_is.pytestmark  # type: ignore[attr-defined]
    assert {word for _, word in mark.args[1]} == set(Status)


def view(run: str = R0, **changes: object) -> RunView:
    shown = RunView(
        run=run,
        params={"seed": 0},
        status=Status.SUCCEEDED,
        step=6,
        max_steps=6,
        committed_step=6,
        loss=0.5,
        metric=0.25,
        attempts=1,
        lost_steps=0,
        lost_unreported=False,
        last_commit_at=100.0,
        node=None,
        detail="",
    )
    return replace(shown, **changes)  # type: ignore[arg-type]


def ranked(goal: str) -> Sweep:
    return small_sweep(metric=Metric(name="val/loss", goal=goal))  # type: ignore[arg-type]


@pytest.mark.parametrize(("goal", "winner"), [("minimize", "b"), ("maximize", "c")])
def test_the_best_run_follows_the_goal(goal: str, winner: str) -> None:
    views = [view("a", metric=0.5), view("b", metric=-1.0), view("c", metric=0.9)]

    found = best(ranked(goal), views)

    assert found is not None
    assert found.run == winner


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_metric_that_is_missing_or_no_number_is_never_best(goal: str) -> None:
    bad = [view(str(n), metric=m) for n, m in enumerate([None, math.nan, math.inf, -math.inf])]

    assert best(ranked(goal), bad) is None
    assert best(ranked(goal), [*bad, view("good", metric=0.0)]) == view("good", metric=0.0)


@pytest.mark.parametrize("word", sorted(set(Status) - {Status.SUCCEEDED}))
def test_only_a_run_that_succeeded_is_best(word: Status) -> None:
    assert best(ranked("minimize"), [view(status=word)]) is None


def test_of_equally_good_runs_the_first_by_name_is_best() -> None:
    assert best(ranked("maximize"), [view("b"), view("a")]) == view("a")


def test_a_row_tells_what_the_log_knows() -> None:
    sweep = small_sweep(runs=1, max_steps=10, metric=Metric(name="val/loss"))
    lost = ended().model_copy(update={"step": 7, "step_s": 1.0})
    state = state_after(
        claimed(), STARTED, committed(4, metrics={"train/loss": 0.75, "val/loss": 0.5}), lost, claimed(2)
    )

    assert rows(sweep, {R0: state}) == [
        RunView(
            run=R0,
            params={"seed": 0},
            status=Status.RECOVERING,
            step=4,
            max_steps=10,
            committed_step=4,
            loss=0.75,
            metric=0.5,
            attempts=2,
            lost_steps=3,
            lost_unreported=False,
            last_commit_at=2.0,
            node="n1",
            detail="",
        )
    ]


def test_what_an_agent_tells_is_newer_than_the_log_but_never_older() -> None:
    sweep = small_sweep(runs=1, max_steps=10)
    state = state_after(claimed(), STARTED, committed(4, metrics={"train/loss": 0.75}))

    def seen(attempt: int, step: int, loss: float | None) -> tuple[int, float | None]:
        work = Work(run_id=R0, attempt=attempt, step=step, loss=loss)
        (row,) = rows(sweep, {R0: state}, {R0: work})
        return row.step, row.loss

    assert seen(1, 6, 0.5) == (6, 0.5)
    assert seen(1, 3, 0.5) == (4, 0.5)
    assert seen(2, 9, 0.5) == (4, 0.75), "another attempt's step"
    assert seen(1, 6, None) == (6, 0.75)


def test_a_failed_run_says_why() -> None:
    failed = finished(Outcome.FAILED).model_copy(update={"detail": "no images"})
    (row,) = rows(small_sweep(runs=1), {R0: state_after(claimed(), failed)})

    assert (row.status, row.detail, row.node) == (Status.FAILED, "no images", None)


def test_the_json_form_is_stable() -> None:
    views = [view(R0, metric=0.5), view(R1, params={"seed": 1})]

    told = as_json(ranked("minimize"), views)

    first, second = told.pop("runs")
    assert told == {
        "schema": 1,
        "sweep": "cat",
        "metric": "val/loss",
        "goal": "minimize",
        "best": R1,
    }
    assert first == {
        "run": R0,
        "params": {"seed": 0},
        "status": "SUCCEEDED",
        "step": 6,
        "max_steps": 6,
        "committed_step": 6,
        "loss": 0.5,
        "metric": 0.5,
        "attempts": 1,
        "lost_steps": 0,
        "lost_unreported": False,
        "last_commit_at": 100.0,
        "node": None,
        "detail": "",
    }
    assert json.loads(json.dumps(second)) == second


def test_the_json_form_of_a_sweep_without_a_metric() -> None:
    told = as_json(small_sweep(), [view(metric=None)])

    assert (told["metric"], told["goal"], told["best"]) == (None, None, None)


def printed(sweep: Sweep, views: list[RunView], width: int = 300) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(table(sweep, views, now=190.0))
    return output.getvalue()


def test_the_table_shows_a_line_a_run_and_marks_the_best() -> None:
    views = [
        view(R0, metric=0.5, loss=None, last_commit_at=None),
        view(R1, status=Status.RUNNING, step=3, node="n2", attempts=2, lost_steps=7, lost_unreported=True),
    ]

    lines = [" ".join(line.split()) for line in printed(ranked("minimize"), views).splitlines()]

    assert lines == [
        "RUN PARAMS STATUS STEP % LOSS VAL/LOSS ATTEMPTS LOST LAST-CKPT NODE",
        f"{R0} ★ seed=0 SUCCEEDED 6/6 100 0.5000 1 0",
        f"{R1} seed=0 RUNNING 3/6 50 0.5000 0.2500 2 7+ 90s n2",
    ]


def test_a_table_that_goes_to_a_file_is_cut_off_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    long = {"dataset.caption": "a photo of a dog " * 20, "learning_rate": 1e-4}

    console().print(table(small_sweep(), [view("r" * 60, params=long, node="n" * 50)], now=0.0))

    header, line = capsys.readouterr().out.splitlines()
    assert "…" not in line
    assert "a photo of a dog " * 20 in line
    assert line.split()[0] == "r" * 60
    assert line.rstrip().endswith("n" * 50)
    assert header.split()[-1] == "NODE"


def test_a_parameter_that_looks_like_markup_is_shown_as_it_is() -> None:
    params = {"dataset.caption": "[bold]a [trigger] dog[/]", "targets": ["to_q"]}

    assert "dataset.caption=[bold]a [trigger] dog[/] targets=['to_q']" in printed(
        small_sweep(), [view(params=params)]
    )


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "a\rb", "\u202etxt", "two\nlines"])
def test_a_parameter_never_commands_the_terminal(text: str) -> None:
    shown = described({"dataset.caption": text})

    assert shown == f"dataset.caption={text!a}"
    assert shown.isprintable()


def test_the_states_of_a_sweep_are_read_from_its_logs() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2)
    run_log(store, R1).append(claimed())

    states = read_states(sweep, store)

    assert list(states) == [R0, R1]
    assert [s.attempt for s in states.values()] == [0, 1]


class Away(MemoryStore):
    away = False

    def list(self, prefix: str, after: str = ""):  # type: ignore[no-untyped-def]
        if self.away:
            raise Unavailable("503")
        return super().list(prefix, after)


def test_a_watcher_shows_the_last_it_knew_while_the_store_is_away() -> None:
    store, sweep = Away(), small_sweep(runs=1)
    watcher = Watcher(sweep, store)
    run_log(store, R0).append(claimed())
    assert [row.status for row in watcher.look()] == [Status.STARTING]

    run_log(store, R0).append(STARTED)
    store.away = True
    assert [row.status for row in watcher.look()] == [Status.STARTING]

    store.away = False
    assert [row.status for row in watcher.look()] == [Status.RUNNING]


def drawn(folder: Path, **seeds: list[int]) -> Path:
    """Samples of prompts, each image in the colour of its seed."""
    folder.mkdir()
    index = []
    for prompt, numbers in seeds.items():
        for seed in numbers:
            name = f"{prompt}-{seed}.png"
            Image.new("RGB", (16, 16), (seed, 0, 0)).save(folder / name)
            index.append({"file": name, "prompt": prompt, "seed": seed})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_a_contact_sheet_shows_what_all_folders_have_side_by_side(tmp_path: Path) -> None:
    columns = {
        "base": drawn(tmp_path / "base", dog=[10, 20], cat=[30, 40], only_here=[50]),
        "★ best": drawn(tmp_path / "best", cat=[130, 140, 150], dog=[110, 120]),
    }

    with Image.open(contact_sheet(columns, tmp_path / "sheet.png")) as image:
        sheet = image.convert("RGB")

    label = 3 * 7 + 2 * MARGIN
    block = 2 * CELL + MARGIN
    assert sheet.size == (label + 2 * block, LABEL + 2 * (CELL + MARGIN))
    reds = [
        [
            sheet.getpixel((label + column * block + n * CELL + 5, LABEL + row * (CELL + MARGIN) + 5))
            for column in (0, 1)
            for n in (0, 1)
        ]
        for row in (0, 1)
    ]
    assert reds == [
        [(seed, 0, 0) for seed in (10, 20, 110, 120)],
        [(seed, 0, 0) for seed in (30, 40, 130, 140)],
    ]


def test_a_contact_sheet_shows_at_most_so_many_seeds(tmp_path: Path) -> None:
    columns = {"base": drawn(tmp_path / "base", dog=[1, 2, 3])}

    narrow = contact_sheet(columns, tmp_path / "1.png", seeds_shown=1)
    wide = contact_sheet(columns, tmp_path / "3.png")

    with Image.open(narrow) as one, Image.open(wide) as three:
        assert three.width - one.width == 2 * CELL


@pytest.mark.parametrize("prompt", ["猫 🐈", "two\nlines", "x" * 500])
def test_a_contact_sheet_takes_any_prompt(prompt: str, tmp_path: Path) -> None:
    folder = drawn(tmp_path / "base", dog=[1])
    (folder / "index.json").write_text(json.dumps([{"file": "dog-1.png", "prompt": prompt, "seed": 1}]))

    with Image.open(contact_sheet({prompt: folder}, tmp_path / "sheet.png")) as sheet:
        assert sheet.width < 4000


def test_a_contact_sheet_never_reads_outside_its_folders(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "base", dog=[1])
    (tmp_path / "secret.png").write_bytes((folder / "dog-1.png").read_bytes())
    (folder / "index.json").write_text(json.dumps([{"file": "../secret.png", "prompt": "dog", "seed": 1}]))

    with pytest.raises(FileNotFoundError):
        contact_sheet({"base": folder}, tmp_path / "sheet.png")
