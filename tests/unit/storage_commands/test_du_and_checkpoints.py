"""``du`` and ``checkpoints``: what takes room, what there is of a run, and what of it is pinned."""

import json
from pathlib import Path

import pytest
from support.cleaning import R0, R1, keys, state
from support.command_line import Orchestrate
from support.runs import incarnation, read_files, ref

from storage import layout
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import Pinned, Quarantined
from storage.run_state import RunState


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
