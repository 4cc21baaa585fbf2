"""What was measured is written for trackers once, whatever happened to the nodes that measured it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import claimed, committed, ended

from orchestrator.commands.tracking import track_run
from orchestrator.grid.sweep import PlannedRun
from orchestrator.reports.series import series
from storage import layout
from storage.log import run_log
from storage.memory import MemoryStore
from trainer.config import Base, Dataset, RunSpec

RUN = "cat-000-0badcafe"
SPEC = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))


def steps(first: int, last: int, loss: float) -> list[dict[str, Any]]:
    return [
        {"event": "step", "step": n, "loss": loss, "lr": 0.5, "step_s": 1.0} for n in range(first, last + 1)
    ]


FIRST = [
    {"event": "started", "step": 0},
    *steps(1, 5, 1.0),
    {"event": "validation", "step": 4, "val/loss": 3.0},
]
SECOND = [
    {"event": "started", "step": 4},
    *steps(5, 7, 2.0),
    {"event": "score", "step": 7, "scores": {"fit": 9}},
]


def test_what_led_nowhere_is_no_part_of_the_line() -> None:
    rows = dict(series([FIRST, SECOND]))

    losses = {step: values["train/loss"] for step, values in rows.items()}
    assert losses == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0}
    assert rows[4] == {"train/loss": 1.0, "train/lr": 0.5, "val/loss": 3.0}
    assert rows[7]["fit"] == 9.0


def test_a_line_that_is_cut_off_or_foreign_says_nothing() -> None:
    assert series([[{"event": "step"}, {"event": "step", "step": 1, "loss": None}, {"step": "x"}]]) == []


def ship(store: MemoryStore, attempt: int, events: list[dict[str, Any]]) -> None:
    store.put(layout.events_key(RUN, attempt, 0), "".join(json.dumps(e) + "\n" for e in events).encode())


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_only_what_stands_is_written_and_a_second_call_goes_on(to: str, tmp_path: Path) -> None:
    pytest.importorskip(to)
    store = MemoryStore()
    log = run_log(store, RUN)
    run = PlannedRun.model_construct(run_id=RUN, spec=SPEC)
    for record in (claimed(), committed(4)):
        log.append(record)
    ship(store, 1, FIRST)
    assert track_run(store, "cat", run, to=to, out=tmp_path) == 4
    assert track_run(store, "cat", run, to=to, out=tmp_path) == 0

    for record in (ended(), claimed(2), committed(7, 2)):
        log.append(record)
    ship(store, 2, SECOND)
    assert track_run(store, "cat", run, to=to, out=tmp_path) == 3

    if to == "tensorboard":
        assert scalars(tmp_path / RUN) == [(n, 1.0 if n < 5 else 2.0) for n in range(1, 8)]
    else:
        kept = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
        assert len(kept) == 2
        assert all(name.endswith(RUN) for name in kept)


def scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars("train/loss")]
