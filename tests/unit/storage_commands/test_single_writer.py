"""``gc`` and ``pin`` where only a controller may write to the logs."""

import pytest
from support.cleaning import DAY_S, R0, R1, aged, state
from support.command_line import Orchestrate
from support.runs import ref

from orchestrator.control.appending import ArbitratedLedger, ledger_of
from orchestrator.control.cluster import Work
from storage.directory import DirectoryStore
from storage.errors import Fenced
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.probe import ProbeResult
from storage.records import RECORD, Finished, Outcome, Pinned, Record, Retired


def test_where_only_a_controller_may_write_gc_retires_nothing_and_says_so(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.probe.open_probed", lambda url: (store, ProbeResult(False, "2 of 16 won")))
    monkeypatch.setattr("orchestrator.commands.session.controller_finder", lambda name, address: lambda: None)

    code, _, said = orchestrate("gc", "--apply")
    assert code == 0
    assert "of cat nothing was retired: only its controller may write" in said
    assert "--address (2 of 16 won)" in said
    assert "deleted 1 object, 1.0 kB; retired 0" in said
    assert state(store).retired == ()
    code, _, said = orchestrate("checkpoints", "pin", "cat/0@10")
    assert code == 1
    assert "only the sweep's controller may write" in said
    assert state(store).pinned == ()


def test_where_only_a_controller_may_write_gc_promises_nothing_of_a_sweep_that_is_over(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_log(store, R0)
    log.refresh()
    log.append(Retired(checkpoints=(log.state.checkpoints[0].ref,), at=1.0))
    log.append(Finished(outcome=Outcome.FAILED, at=1.0))
    run_log(store, R1).append(Finished(outcome=Outcome.CANCELLED, at=1.0))
    aged(store, DAY_S)
    monkeypatch.setattr("storage.probe.open_probed", lambda url: (store, ProbeResult(False, "2 of 16 won")))

    for arguments in (["gc"], ["gc", "--apply"]):
        code, printed, said = orchestrate(*arguments)
        assert code == 0
        assert "superseded" not in printed
        assert "delete 1 checkpoint, " in printed + said, "it was retired while there was a controller"
        assert "2 superseded checkpoints of cat, which is over: cannot be deleted from this store" in said
        assert "(2 of 16 won)" in said
        assert "--address" not in said
    assert "retired 0" in said

    printed = orchestrate("gc")[1]
    assert "checkpoint, " not in printed
    assert "nothing to delete" in printed


def test_where_only_a_controller_may_write_nothing_of_a_sweep_that_is_over_is_pinned(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.probe.open_probed", lambda url: (store, ProbeResult(False, "2 of 16 won")))
    run_log(store, R0).append(Finished(outcome=Outcome.SUCCEEDED, at=1.0))
    assert "orchestrate resume" in orchestrate("checkpoints", "pin", "cat/0@10")[2], "the other run goes on"

    run_log(store, R1).append(Finished(outcome=Outcome.CANCELLED, at=1.0))
    code, _, said = orchestrate("checkpoints", "pin", "cat/0@10")
    assert code == 1
    assert said.startswith("not possible on this store any more: cat is over")
    assert "resume" not in said
    assert f"orchestrate checkpoints pull {R0}@10" in said


class Controller:
    """A controller within reach."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.appended: list[Record] = []

    def training(self) -> dict[str, Work]:
        return {}

    def cancel(self, run_ids: object) -> None:
        raise AssertionError

    def append(self, run_id: str, body: bytes) -> str | None:
        record = RECORD.validate_json(body)
        try:
            run_log(self._store, run_id).append(record)
        except Fenced as error:
            return str(error)
        self.appended.append(record)
        return None


def test_where_only_a_controller_may_write_it_writes_for_the_commands(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(store)
    monkeypatch.setattr("storage.probe.open_probed", lambda url: (store, ProbeResult(False, "2 of 16 won")))
    monkeypatch.setattr(
        "orchestrator.commands.session.controller_finder", lambda name, address: lambda: controller
    )

    assert orchestrate("checkpoints", "pin", "cat/0@10")[0] == 0
    assert orchestrate("gc", "--apply")[0] == 0
    assert [record.kind for record in controller.appended] == ["pinned", "retired"]
    assert [c.step for c in state(store).retired] == [30]

    ledger = ledger_of(store, R0, controller, atomic=False)
    assert isinstance(ledger, ArbitratedLedger)
    with pytest.raises(Fenced, match="is not there"):
        ledger.append(Pinned(checkpoint=ref(99), at=1.0))
