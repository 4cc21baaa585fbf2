"""``orchestrate nodes`` and ``drain``: which nodes there are, what they do, and leaving one alone."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from support.fake_cluster import FakeCluster, small_sweep

from orchestrator.cli import main
from orchestrator.control.cluster import StoreSpeed
from orchestrator.control.controller import Controller
from orchestrator.control.draining import drain_log
from orchestrator.control.placing import SlotNote, Standing
from orchestrator.reports.node_table import table
from orchestrator.reports.nodes import NodeView, nodes
from storage import layout
from storage.directory import DirectoryStore
from storage.drains import DrainAsked, Drains
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Claimed, Ended, EndReason

R0 = "cat-0-00000000"


def slot(node: str, standing: Standing, run_id: str | None = None, *, number: int = 0) -> SlotNote:
    return SlotNote(
        slot=f"{node}/{number}", node=node, up_since=10.0, standing=standing, run_id=run_id, silent_s=4.0
    )


def test_a_node_that_cannot_hear_notices_is_up_and_says_so() -> None:
    (view,) = nodes([replace(slot("a", Standing.FREE), unheard="http://169.254.169.254: timed out")])
    assert view.state == "up"
    assert view.why == "notices of its end cannot be heard: http://169.254.169.254: timed out"


def test_how_fast_the_store_is_from_a_node_is_what_its_best_slot_has_seen() -> None:
    slow, fast = StoreSpeed(up=1.25e6, down=9e6), StoreSpeed(up=2.5e6, down=8e6)
    views = nodes(
        [
            replace(slot("a", Standing.FREE), speed=slow),
            replace(slot("a", Standing.FREE, number=1), speed=fast),
            slot("b", Standing.FREE),
        ]
    )
    assert [(view.up_mb_s, view.down_mb_s) for view in views] == [(2.5, 9.0), (None, None)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table("cat", views))
    assert "2.5 MB/s" in console.export_text()


def states(views: list[NodeView]) -> dict[str, str]:
    return {view.node: view.state for view in views}


def test_a_node_is_what_its_slots_are() -> None:
    drains = Drains(asked=tuple(DrainAsked(node=n, grace_s=9.0, at=0.0) for n in ("d", "e", "f")))
    notes = [
        slot("a", Standing.BUSY, "r1"),
        slot("a", Standing.GONE, number=1),
        slot("b", Standing.SILENT, "r2"),
        slot("c", Standing.GONE),
        slot("d", Standing.DRAINED, "r3"),
        slot("e", Standing.DRAINED),
        slot("g", Standing.FREE),
        slot("g", Standing.BARRED, number=1),
    ]

    views = nodes(notes, drains)

    assert states(views) == {
        "a": "up",
        "b": "silent",
        "c": "gone",
        "d": "draining",
        "e": "drained",
        "f": "not seen",
        "g": "not used",
    }
    assert (views[0].slots, views[0].busy, views[0].runs) == (1, 1, ("r1",))
    assert views[3].why == "by hand; attempts got 9 s to end"


def test_a_controller_tells_what_its_slots_do() -> None:
    store, sweep = MemoryStore(), small_sweep(runs=2, max_steps=50)
    cluster = FakeCluster(store, sweep, nodes=3)
    controller = Controller(sweep, store, cluster, clock=cluster.clock)
    for _ in range(3):
        controller.tick()
        cluster.advance()
    cluster.silence("n1/0")
    cluster.lose_node("n2")
    controller.tick()

    views = nodes(controller.notes())

    assert states(views) == {"n1": "silent", "n2": "gone", "n3": "up"}
    assert views[0].runs == (R0,)


def test_the_table_shows_it_all() -> None:
    console = Console(width=200)
    drains = Drains(asked=(DrainAsked(node="n1", grace_s=120.0, at=0.0),))
    views = nodes([slot("n1", Standing.DRAINED, R0), slot("n2", Standing.SILENT)], drains)

    with console.capture() as capture:
        console.print(table("cat", views, now=100.0))

    heading, first, second = (line.split() for line in capture.get().splitlines())
    assert heading == ["SWEEP", "NODE", "STATE", "BUSY/SLOTS", "UP", "SILENT", "STORE", "RUNS", "WHY"]
    assert first[:7] == ["cat", "n1", "draining", "1/1", "90s", R0, "by"]
    assert second[:6] == ["cat", "n2", "silent", "0/1", "90s", "4s"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    """A sweep whose first run was claimed on n1; nobody works on it."""
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store, sweep = DirectoryStore(tmp_path / "store"), small_sweep()
    store.create(layout.sweep_spec(sweep.name), sweep.to_json())
    run_log(store, R0).append(Claimed(attempt=1, incarnation="0" * 8, node="n1", slot="n1/0", at=10.0))
    return store


def orchestrate(store: DirectoryStore, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--store", store.url])


def test_without_a_controller_a_drain_is_left_for_the_next(store: DirectoryStore) -> None:
    drained = orchestrate(store, "drain", "n1", "cat", "--deadline", "30")
    assert drained.exit_code == 0, drained.output
    assert "cat: n1 is drained: attempts there get 30 s to end (no controller was reached" in drained.output
    assert drain_log(store, "cat").refresh().of("n1") is not None

    shown = orchestrate(store, "nodes", "cat", "-o", "json")
    (node,) = json.loads(shown.output)["nodes"]
    assert (node["node"], node["state"], node["runs"]) == ("n1", "draining", [R0])

    undone = orchestrate(store, "drain", "n1", "cat", "--undo")
    assert undone.exit_code == 0, undone.output
    assert drain_log(store, "cat").refresh().asked == ()


def test_who_names_no_sweep_and_reaches_no_controller_is_told_so(store: DirectoryStore) -> None:
    result = orchestrate(store, "nodes")

    assert (result.exit_code, result.stdout) == (0, "")
    assert "no controller was reached: name a sweep" in result.stderr


def test_a_sweep_that_trains_nowhere_has_no_table(store: DirectoryStore) -> None:
    run_log(store, R0).append(Ended(attempt=1, reason=EndReason.NODE_LOST, at=20.0))

    shown = orchestrate(store, "nodes", "cat")

    assert (shown.exit_code, shown.stdout) == (0, "")
    assert shown.stderr.splitlines()[-1] == "cat: no node trains for it"


def test_a_node_that_nobody_has_is_an_error_when_no_sweep_is_named(store: DirectoryStore) -> None:
    result = orchestrate(store, "drain", "n7")

    assert result.exit_code == 4
    assert "no node 'n7' trains for a sweep that a controller works on" in result.output
