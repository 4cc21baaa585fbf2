"""``orchestrate describe``: what is settled about a run, from the store alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fake_cluster import small_sweep
from support.runs import claimed, committed, ended
from support.tiny_world import build_images

from orchestrator.amounts import size_text
from orchestrator.cli import main
from orchestrator.grid.schema import Checkpoint
from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import Sweep
from orchestrator.reports.describing import describe, text
from storage import layout
from storage.content.store import store_for
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import EndReason, Finished, Outcome
from trainer.dataset.folder import dataset_content
from trainer.interval import UNMEASURED


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def filled(store: ObjectStore, checkpoint: Checkpoint) -> tuple[Sweep, str]:
    sweep = small_sweep(runs=2, name="cat", checkpoint=checkpoint)
    submit(sweep, store)
    run_id = sweep.runs[1].run_id
    log = run_log(store, run_id)
    log.append(claimed(1))
    log.append(committed(3))
    log.append(ended(1, EndReason.NODE_LOST).model_copy(update={"detail": "gone\x1b[31m"}))
    log.append(claimed(2, node="n2"))
    return sweep, run_id


def say(store: ObjectStore, run_id: str, attempt: int, n: int, *events: object) -> None:
    lines = "".join(json.dumps(event) + "\n" for event in events)
    store.put(layout.events_key(run_id, attempt, n), lines.encode())


def test_the_facts_of_a_run(store: DirectoryStore) -> None:
    sweep, run_id = filled(store, Checkpoint(every=50))
    found = describe(store, sweep, run_id)

    assert found["schema"] == 1
    assert (found["status"], found["node"], found["step"]) == ("RECOVERING", "n2", 3)
    assert [(a["node"], a["reason"], a["committed_step"]) for a in found["attempts"]] == [
        ("n1", "NODE_LOST", 3),
        ("n2", None, None),
    ]
    assert found["last_commit"]["step"] == 3
    assert found["checkpoint"]["interval"]["said"] == "every 50 steps, as the sweep says"
    assert found["spec"] == sweep.runs[1].spec.model_dump(mode="json")
    assert "\x1b" not in "\n".join(text(found))


def test_the_interval_now_and_why_in_one_line(store: DirectoryStore) -> None:
    sweep, run_id = filled(store, Checkpoint(every="auto"))

    def said() -> str:
        return str(describe(store, sweep, run_id)["checkpoint"]["interval"]["said"])

    assert said() == "every 30 s: what a checkpoint costs is not told yet", "for there is one"
    say(store, run_id, 1, 1, {"event": "interval", "every_s": 99.0, "why": "an older attempt"})
    say(store, run_id, 2, 1, {"event": "interval", "every_s": 30.0, "why": "first"}, {"event": "step"})
    say(
        store,
        run_id,
        2,
        2,
        {"event": "interval", "every_s": 66.4, "why": "its upload takes 66 s"},
        {"event": "step"},
    )

    found = describe(store, sweep, run_id)

    assert found["checkpoint"]["interval"]["every_s"] == 66.4
    assert "checkpoint  every 66 s: its upload takes 66 s" in text(found)

    say(store, run_id, 2, 3, {"event": "interval", "every_s": 30.0, "why": UNMEASURED})
    assert said() == "every 30 s: what a checkpoint costs is not told yet"
    run_log(store, run_id).append(Finished(outcome=Outcome.SUCCEEDED, at=2.0))
    assert said() == "every 30 s: the run was over before the cost of a checkpoint was told"


@pytest.mark.parametrize(
    "line", ['{"event": "interval"}', '{"event": "interval", "every_s": "x"}', '"interval"']
)
def test_an_event_that_is_none_is_passed_over(line: str, store: DirectoryStore) -> None:
    sweep, run_id = filled(store, Checkpoint(every="auto"))
    store.put(layout.events_key(run_id, 2, 1), line.encode())
    assert describe(store, sweep, run_id)["checkpoint"]["interval"]["every_s"] == 30.0


def test_it_says_which_inputs_are_in_the_store(store: DirectoryStore, tmp_path: Path) -> None:
    local = dataset_content(build_images(tmp_path / "images", count=2))
    sweep = small_sweep(runs=1, name="cat")
    spec = sweep.runs[0].spec
    dataset = spec.dataset.model_copy(update={"digest": local.digest})
    run = sweep.runs[0].model_copy(update={"spec": spec.model_copy(update={"dataset": dataset})})
    sweep = sweep.model_copy(update={"runs": (run,)})
    submit(sweep, store)
    store_for(store, "cat", local, submitted=True)

    found = describe(store, sweep, run.run_id)

    assert [one["stored_bytes"] for one in found["inputs"]] == [local.listing.size_bytes, None]
    size = size_text(local.listing.size_bytes)
    assert any(f"sha256 {local.digest[:12]}, in the store ({size})" in line for line in text(found))


def test_the_command_prints_text_or_json(store: DirectoryStore) -> None:
    _, run_id = filled(store, Checkpoint())
    asked = CliRunner().invoke(main, ["describe", "cat/1", "--store", store.url])
    assert asked.exit_code == 0
    assert asked.output.startswith(f"run         {run_id} (seed=1)\nstatus      RECOVERING on n2, step 3 of ")
    as_json = CliRunner().invoke(main, ["describe", run_id, "--store", store.url, "-o", "json"])
    assert json.loads(as_json.output)["run"] == run_id
    assert CliRunner().invoke(main, ["describe", "dog/0", "--store", store.url]).exit_code == 4
