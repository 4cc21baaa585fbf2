"""``gc``, ``du`` and ``checkpoints`` at the command line, on a folder whose file times tell its age."""

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fake_cluster import small_sweep
from support.flaky_store import Fault, FlakyStore
from support.invariants import violations
from support.runs import claimed, ended, incarnation, read_files, ref, write_checkpoint

from orchestrator.cli import main
from orchestrator.control.appending import ArbitratedLedger, ledger_of
from orchestrator.control.cluster import Work
from orchestrator.grid.schema import Checkpoint, Metric
from orchestrator.grid.submission import submit
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.errors import AccessDenied, Fenced
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.probe import ProbeResult
from storage.records import (
    RECORD,
    Claimed,
    Committed,
    Finished,
    Outcome,
    Pinned,
    Quarantined,
    Record,
    Retired,
    StoredFile,
)
from storage.run_state import RunState
from storage.snapshots import Known, write_sweep

CAT = small_sweep(
    runs=2, name="cat", metric=Metric(name="loss"), checkpoint=Checkpoint(keep_last=2, grace_s=300.0)
)
R0, R1 = (run.run_id for run in CAT.runs)
DAY_S = 86_400.0
FILE = StoredFile(name="adapter.safetensors", size_bytes=1, sha256="0" * 64)

Orchestrate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a thing: a folder's store flushes every object to the disk."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    """A sweep of two runs: one trains, with four checkpoints and a node lost; the other was never claimed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ORCHESTRATE_STORE", "file://./store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = DirectoryStore(tmp_path / "store")
    submit(CAT, store)
    log = run_log(store, R0)
    checkpoints = CheckpointStore(store, R0, log)
    log.append(claimed())
    for step in (10, 20):
        checkpoints.publish(write_checkpoint(tmp_path / "out", step), 1, incarnation(1))
    store.put(layout.checkpoint_file(R0, 1, incarnation(1), 30, "half"), b"x" * 1000)
    log.append(ended())
    log.append(claimed(2))
    for step in (30, 40, 50):
        checkpoints.publish(write_checkpoint(tmp_path / "out", step), 2, incarnation(2))
    store.put(layout.log_text_key(R0, 1, 0), b"epoch 1\n")
    store.put(f"probe/{uuid.UUID(int=1)}/0", b"left by a probe that died")
    return store


@pytest.fixture
def orchestrate(store: DirectoryStore) -> Orchestrate:
    """Run a command; returns its exit code, what it printed, and what it said."""

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def aged(store: DirectoryStore, seconds: float) -> None:
    """Make everything in the store so much older."""
    then = time.time() - seconds
    for info in store.list(""):
        os.utime(store.root / info.key, (then, then))


def keys(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list("")]


def state(store: ObjectStore, run_id: str = R0) -> RunState:
    assert violations(store, run_id) == []
    return run_log(store, run_id).refresh()


# gc


def test_gc_says_what_it_would_do_and_does_nothing(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    before = keys(store)

    code, printed, said = orchestrate("gc")

    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    # What attempt 2 resumed from, 20, stays; and of all the best is the last.
    assert lines[1][:5] == ["cat", "superseded", "checkpoints", "2", "4"]
    assert lines[2][:7] == ["cat", "uploads", "of", "fenced", "attempts", "1", "1.0"]
    assert "would delete 2 checkpoints" in printed
    assert "keep 3 checkpoints (1 resumed from, 1 keep_last, 1 newest)" in printed
    assert "Dry run" in said
    assert keys(store) == before


def test_gc_retires_deletes_what_nobody_can_want_and_later_the_rest(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    code, _, said = orchestrate("gc", "--apply")

    assert code == 0
    assert "deleted 1 object, 1.0 kB; retired 2" in said
    assert [c.step for c in state(store).retired] == [10, 30]
    assert len([key for key in keys(store) if "/data/" in key]) == 10

    assert "deleted 0 objects, 0 B; retired 0" in orchestrate("gc", "--apply")[2], "the grace is not over"
    aged(store, 301)
    assert "deleted 4 objects" in orchestrate("gc", "--apply")[2]
    assert state(store).retired == ()
    assert [c.step for c in state(store).checkpoints] == [20, 40, 50]

    aged(store, 3600)
    assert "deleted 1 object" in orchestrate("gc", "--apply")[2], "the probe's"
    code, printed, said = orchestrate("gc")
    assert (code, said) == (0, "")
    assert "nothing to delete; keep 3 checkpoints" in printed


def test_gc_keeps_what_is_pinned_whatever_it_is_asked(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    assert orchestrate("checkpoints", "pin", "cat/0@10")[:2] == (
        0,
        f"{R0}: step 10 is pinned, and stays until it is unpinned\n",
    )
    orchestrate("gc", "--apply", "--keep-last", "1")
    assert [c.step for c in state(store).retired] == [30]

    assert orchestrate("checkpoints", "unpin", "cat/0@10")[0] == 0
    orchestrate("gc", "--apply", "--keep-last", "1")
    assert [c.step for c in state(store).retired] == [30, 10]


def test_an_old_finished_sweep_keeps_the_newest_the_best_and_the_pinned(
    store: DirectoryStore, orchestrate: Orchestrate, tmp_path: Path
) -> None:
    log = run_log(store, R0)
    log.append(Pinned(checkpoint=ref(10), at=1.0))
    log.append(Finished(outcome=Outcome.FAILED, at=1.0))
    aged(store, 8 * DAY_S)
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert [c.step for c in state(store).retired] == [20, 30], "the other run is not over: policy decides"

    run_log(store, R1).append(Finished(outcome=Outcome.CANCELLED, at=1.0))
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert len(state(store).retired) == 2, "it ended just now, by the store's clock"

    aged(store, 8 * DAY_S)
    orchestrate("gc", "--apply", "--older-than", "7d")
    assert [c.step for c in state(store).checkpoints] == [10, 50]


def test_gc_as_json(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    code, printed, _ = orchestrate("gc", "-o", "json")

    found = json.loads(printed)
    assert (code, found["schema"], found["applied"], found["done"]) == (0, 1, False, None)
    assert [(row["sweep"], row["kind"], row["checkpoints"], row["when"]) for row in found["plan"]] == [
        ("cat", "superseded checkpoints", 2, "later"),
        ("cat", "uploads of fenced attempts", 0, "now"),
    ]
    assert found["kept"] == {
        R0: {"20.a1": ["resumed from"], "40.a2": ["keep_last"], "50.a2": ["newest", "best"]}
    }

    applied = json.loads(orchestrate("gc", "--apply", "-o", "json")[1])
    assert (applied["applied"], applied["done"]["retired"], applied["done"]["objects"]) == (True, 2, 1)


def test_a_run_whose_log_is_damaged_is_left_alone(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    store.put(layout.log_entry(layout.run_log_prefix(R0), 1), b"rot")
    before = keys(store)

    code, _, said = orchestrate("gc", "--apply")

    assert code == 0
    assert f"{R0} is left alone" in said
    assert keys(store) == before


def test_a_run_damaged_before_its_snapshot_or_beyond_any_key_is_left_alone_and_others_are_not(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    log = run_log(store, R0)
    log.refresh()
    log.append(Retired(checkpoints=(log.state.checkpoints[0].ref,), at=1.0))
    write_sweep(store, "cat", {R0: Known(snapshot=log.snapshot())})
    store.put(layout.log_entry(layout.run_log_prefix(R0), 1), b"rot")
    other = run_log(store, R1)
    other.append(Claimed(attempt=1, incarnation="0badcafe", node="n", slot="n/0", at=1.0))
    other.append(Committed(attempt=1, incarnation="0badcafe", step=10**9, files=(FILE,), at=1.0))
    before = keys(store)

    for command in (["gc", "--apply"], ["gc", "--apply", "--older-than", "1h"]):
        code, _, said = orchestrate(*command)
        assert code == 0
        assert f"{R0} is left alone" in said
        assert f"{R1} is left alone" in said
        assert [key for key in before if key not in keys(store)] == []
    assert orchestrate("du")[0] == 0


def test_a_snapshot_saves_reading_and_nothing_is_deleted_on_its_word(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    log = run_log(store, R0)
    log.refresh()
    wrong = replace(log.state, checkpoints=log.state.checkpoints[-1:])  # as if 10 to 40 had never been
    right, lie = (Known(snapshot=replace(log.snapshot(), state=said)) for said in (log.state, wrong))
    write_sweep(store, "cat", {R0: right})
    assert json.loads(orchestrate("gc", "-o", "json")[1])["requests"] == 12 - 8 + 2

    write_sweep(store, "cat", {R0: lie})
    assert "uploads of fenced attempts" in orchestrate("gc")[1]
    assert "deleted 1 object, 1.0 kB; retired 2" in orchestrate("gc", "--apply")[2]
    assert [c.step for c in state(store).checkpoints] == [20, 40, 50]


def test_a_store_that_refuses_to_delete_is_told_once(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(store, 2 * DAY_S)

    def refuse(self: DirectoryStore, keys: object) -> None:
        for key in keys:  # type: ignore[attr-defined]
            if not key.startswith("probe/") or key == f"probe/{uuid.UUID(int=1)}/0":
                raise AccessDenied(f"{key}: no right to delete")

    monkeypatch.setattr(DirectoryStore, "delete", refuse)
    code, _, said = orchestrate("gc", "--apply")

    assert code == 5
    assert said.count("no right to delete") == 1
    assert "training is not affected" in said
    assert [c.step for c in state(store).retired] == [10, 30]


def test_a_store_that_goes_away_is_exit_6_and_the_next_gc_goes_on(
    store: DirectoryStore, orchestrate: Orchestrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flaky(url: str) -> tuple[ObjectStore, ProbeResult]:
        return FlakyStore(store, 1, Fault.REFUSE), ProbeResult(True, "")

    with monkeypatch.context() as patch:
        patch.setattr("storage.probe.open_probed", flaky)
        code, _, said = orchestrate("gc", "--apply")
    assert code == 6
    assert "what is left, the next gc deletes" in said

    assert "deleted 1 object, 1.0 kB; retired 2" in orchestrate("gc", "--apply")[2]


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


# du


def test_du_says_what_takes_room_biggest_first(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    code, printed, said = orchestrate("du", "-o", "json")

    found = json.loads(printed)
    assert (code, said, found["schema"]) == (0, "", 1)
    sizes = [line["size_bytes"] for line in found["usage"]]
    assert sizes == sorted(sizes, reverse=True)
    assert found["size_bytes"] == sum(info.size_bytes for info in store.list(""))
    assert found["objects"] == len(keys(store))
    kinds = {line["kind"]: line["objects"] for line in found["usage"] if line["run"] in (R0, "")}
    assert kinds == {"checkpoints": 10, "orphaned": 1, "records": 9, "logs": 1, "sweep": 1, "probes": 1}
    # Two listings, the sweep's spec, the listing of a log, its 8 records; a folder's clock is at hand.
    assert found["requests"] == 12

    run_log(store, R0).append(Quarantined(checkpoint=ref(20), reason="rot", at=1.0))
    orchestrate("gc", "--apply")
    store.put(layout.checkpoint_file(R0, 2, incarnation(2), 60, "half"), b"under way")
    lines = json.loads(orchestrate("du", "cat", "-o", "json")[1])["usage"]
    kinds = {line["kind"]: line["objects"] for line in lines if line["run"] == R0}
    assert kinds == {
        "checkpoints": 4, "retired": 4, "quarantined": 2, "uploading": 1, "records": 11, "logs": 1
    }  # fmt: skip


def test_du_of_a_sweep_that_is_not_there_is_exit_4(orchestrate: Orchestrate) -> None:
    code, _, said = orchestrate("du", "kat")
    assert code == 4
    assert "did you mean 'cat'?" in said


def test_du_tells_contents_apart(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    digests = ["a" * 64, "b" * 64]
    for digest in digests:
        store.put(layout.log_entry(layout.content_log_prefix(digest), 1), b"{}")
    printed = orchestrate("du")[1]
    assert all(f"content {digest[:12]} " in printed for digest in digests)
    found = json.loads(orchestrate("du", "-o", "json")[1])["usage"]
    assert [line["digest"] for line in found if line["kind"] == "content"] == digests


def test_where_there_is_no_folder_there_is_no_store(orchestrate: Orchestrate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in ("file/x", "mistyped"):
        for command in ("du", "gc"):
            code, printed, said = orchestrate(command, "--store", str(tmp_path / path))
            assert (code, printed) == (4, "")
            assert f"{path}: there is no store" in said
    (tmp_path / "fresh").mkdir()
    assert orchestrate("du", "--store", str(tmp_path / "fresh"))[0] == 0


def test_du_as_a_table(orchestrate: Orchestrate) -> None:
    code, printed, said = orchestrate("du")
    assert code == 0
    assert printed.splitlines()[0].split() == ["SWEEP", "RUN", "KIND", "OBJECTS", "SIZE"]
    assert "12 requests made" in said


# checkpoints


def test_checkpoints_are_listed_with_their_marks(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    log = run_log(store, R0)
    log.append(Pinned(checkpoint=ref(10), at=1.0))
    log.append(Quarantined(checkpoint=ref(30, 2), reason="rot", at=1.0))

    code, printed, _ = orchestrate("checkpoints", "ls", "cat/0", "-o", "json")

    found = json.loads(printed)
    assert (code, found["schema"], found["run"]) == (0, 1, R0)
    assert [(c["step"], c["attempt"], c["marks"]) for c in found["checkpoints"]] == [
        (10, 1, ["pinned"]),
        (20, 1, ["resumed from"]),
        (30, 2, ["quarantined"]),
        (40, 2, ["keep_last"]),
        (50, 2, ["newest", "best"]),
    ]
    table = orchestrate("checkpoints", "ls", "cat/0")[1].splitlines()
    assert table[0].split() == ["STEP", "ATTEMPT", "SIZE", "SENT", "AGE", "METRICS", "MARKS"]
    assert table[1].split()[-1] == "pinned"
    assert [line for line in table if line != line.rstrip()] == []
    assert orchestrate("checkpoints", "ls", "cat/1")[2] == f"{R1} has no checkpoint yet\n"


def test_verify_reads_every_byte(store: DirectoryStore, orchestrate: Orchestrate) -> None:
    assert orchestrate("checkpoints", "verify", "cat/0@20")[:2] == (0, f"{R0} step 20 (attempt 1): whole\n")

    damaged = state(store).checkpoints[1]
    store.put(layout.committed_file(R0, damaged, "adapter.safetensors"), b"rot")
    store.delete([layout.committed_file(R0, state_of(store).checkpoints[2], "adapter.safetensors")])
    code, printed, said = orchestrate("checkpoints", "verify", "cat/0")

    lines = printed.splitlines()
    assert code == 1
    assert [line.endswith(": whole") for line in lines] == [True, False, False, True, True]
    assert "gives up a damaged checkpoint by itself" in said
    assert orchestrate("checkpoints", "verify", "cat/0@20")[0] == 1


def state_of(store: ObjectStore) -> RunState:
    """The state without judging the data, which this test spoils."""
    return run_log(store, R0).refresh()


def test_pull_leaves_a_verified_folder_or_nothing(
    store: DirectoryStore, orchestrate: Orchestrate, tmp_path: Path
) -> None:
    code, printed, _ = orchestrate("checkpoints", "pull", "cat/0@40", "--out", "here")
    assert code == 0
    folder = Path(printed.strip())
    assert folder == Path("here") / R0 / "step-000000040"
    assert read_files(folder) == read_files(tmp_path / "out" / "step-000000040")
    assert orchestrate("checkpoints", "pull", "cat/0")[1].strip().endswith("step-000000050")

    store.put(layout.committed_file(R0, state(store).checkpoints[0], "adapter.safetensors"), b"rot")
    assert orchestrate("checkpoints", "pull", "cat/0@10", "--out", "there")[0] == 1
    assert list((tmp_path / "there").rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("checkpoints", "pin", "cat/0"), 2, "say which step: cat/0@STEP"),
        (("checkpoints", "pin", "cat/0@11"), 4, "there are: 10, 20, 30, 40, 50"),
        (("checkpoints", "pin", "cat/0@1@2"), 2, "is no run"),
        (("checkpoints", "pull", "cat/0@abc"), 2, "is no run"),
        (("checkpoints", "pull", "cat/1"), 4, "has no checkpoint yet"),
        (("checkpoints", "verify", "cat/1"), 4, "has no checkpoint yet"),
        (("checkpoints", "ls", "cat/7"), 4, "no run"),
        (("gc", "--older-than", "soon"), 2, "such as 7d"),
        (("gc", "--keep-last", "0"), 2, "0 is not in the range"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[str, ...], code: int, reason: str, orchestrate: Orchestrate
) -> None:
    found, _, said = orchestrate(*arguments)
    assert (found, reason in said) == (code, True), said


def test_pinning_twice_and_unpinning_what_is_not_pinned_change_nothing(
    store: DirectoryStore, orchestrate: Orchestrate
) -> None:
    for _ in range(2):
        assert orchestrate("checkpoints", "pin", "cat/0@10")[0] == 0
    assert state(store).pinned == (ref(10),)
    orchestrate("checkpoints", "unpin", "cat/0@10")
    assert orchestrate("checkpoints", "unpin", "cat/0@10")[:2] == (0, f"{R0}: step 10 was not pinned\n")
