"""The crash matrix: at each point somebody dies, wakes late or finds damage; then the next owner goes on.

The numbers are those of the matrix. Each test says what is left, what the next owner does, and what is lost.
In a folder the process that dies is a real one; on radosgw only where its disk matters. The invariants hold
after each death, and again once the next owner has taken the run to its end, of which nothing is left over.
"""

import multiprocessing
from pathlib import Path
from typing import NoReturn

import pytest
from proof.dying import KILLED, Death, DyingStore, live, live_and_exit
from support.flaky_store import Died
from support.invariants import Told, Witnessed, leftovers, violations
from support.runs import (
    RUN,
    claimed,
    contents,
    ended,
    finished,
    incarnation,
    read_files,
    ref,
    write_checkpoint,
)
from support.s3_servers import S3Server

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Corrupt, Fenced, Unavailable
from storage.local import complete_checkpoints, remove_stale
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.run_state import RunState
from storage.url import open_store

RESUMES_FROM = {
    Death.SNAPSHOT: 20,
    Death.LOCAL_WRITE: 20,
    Death.STAGED: 20,  # on another node
    Death.UPLOADING: 20,
    Death.UPLOADED: 20,
    Death.COMMIT_SENT: 30,
    Death.COMMITTED: 30,
    Death.CLAIMED: 20,
    Death.RETIRED: 20,
    Death.DELETING: 20,
}
LEFT_BEHIND = {Death.UPLOADING: 1, Death.UPLOADED: 2}
"""How many objects no record names after the death, where there are any."""


class Run:
    """One run in a store, and all that its owners were told."""

    def __init__(self, store: ObjectStore, disk: Path) -> None:
        self.store = store
        self.disk = disk
        self.told = Told()
        self.damaged: set[str] = set()

    def ledger(self, store: ObjectStore | None = None) -> Witnessed:
        return Witnessed(run_log(store or self.store, RUN, sleep=lambda seconds: None), self.told)

    def checkpoints(self, store: ObjectStore | None = None) -> CheckpointStore:
        return CheckpointStore(store or self.store, RUN, self.ledger(store))

    @property
    def state(self) -> RunState:
        return run_log(self.store, RUN).refresh()

    def begin(self) -> None:
        """Attempt 1 has committed steps 10 and 20."""
        self.ledger().append(claimed(1))
        self.publish(10)
        self.publish(20)

    def publish(self, step: int, attempt: int = 1, *, store: ObjectStore | None = None) -> None:
        local = write_checkpoint(self.disk / f"attempt-{attempt}", step)
        self.checkpoints(store).publish(local, attempt, incarnation(attempt))

    def claim_next(self) -> int:
        """Give up whoever is running, and claim the run for the next attempt."""
        ledger = self.ledger()
        state = ledger.refresh()
        if state.running:
            state = ledger.append(ended(state.attempt))
        return ledger.append(claimed(state.attempt + 1)).attempt

    def resume(self, attempt: int) -> int:
        """Fetch what the attempt resumes from, compare it byte for byte, and return its step."""
        where = self.disk / f"resumed-{attempt}"
        checkpoint, path = self.checkpoints().fetch_newest(self.state, where, attempt=attempt)
        assert checkpoint is not None
        assert path is not None
        assert read_files(path) == contents(checkpoint.step)
        return checkpoint.step

    def go_on(self) -> int:
        """Be the next owner: claim, resume, finish, clean up. Return the step that it resumed from."""
        attempt = self.claim_next()
        step = self.resume(attempt)
        local = write_checkpoint(self.disk / f"attempt-{attempt}", 40, final=True)
        checkpoints = self.checkpoints()
        checkpoints.publish(local, attempt, incarnation(attempt))
        state = self.ledger().append(finished())
        self.check()
        checkpoints.retire([c.ref for c in state.checkpoints[:-1]])
        checkpoints.sweep_orphans(checkpoints.reap(self.state))
        self.check()
        assert leftovers(self.store, RUN, self.state) == []
        assert len(self.data()) == len(local.manifest.files)
        return step

    def data(self) -> list[str]:
        return [info.key for info in self.store.list(layout.data_prefix(RUN))]

    def check(self, told: Told | None = None) -> None:
        assert violations(self.store, RUN, told, damaged=self.damaged) == []


everywhere = pytest.mark.parametrize("atomic_store", ["directory", "radosgw"], indirect=True)


@pytest.fixture
def run(atomic_store: ObjectStore, tmp_path: Path) -> Run:
    begun = Run(atomic_store, tmp_path / "disk")
    begun.begin()
    return begun


def die(run: Run, death: Death) -> Path:
    """Let a process die at a point, really or, where nobody can tell the difference, by an exception."""
    disk = run.disk / "dying"
    if death.on_disk or run.store.url.startswith("file:"):
        process = multiprocessing.get_context("spawn").Process(
            target=live_and_exit, args=(run.store.url, disk, death)
        )
        process.start()
        process.join()
        assert process.exitcode == KILLED
        return disk

    def gone() -> NoReturn:
        raise Died

    if death is Death.CLAIMED:
        run.ledger().append(ended(1))
    dying = DyingStore(run.store, death, gone)
    with pytest.raises(Died):
        live(dying, run.ledger(dying), disk, death, gone)
    run.check(run.told)
    return disk


@everywhere
@pytest.mark.parametrize("death", Death)
def test_after_a_death_the_next_owner_resumes_from_the_newest_commit(run: Run, death: Death) -> None:
    """1 to 7, 10 to 12. Lost: what was not committed; space until somebody cleans up."""
    die(run, death)

    run.check()
    orphans = leftovers(run.store, RUN, run.state)
    assert len(orphans) == LEFT_BEHIND.get(death, 0)
    assert run.go_on() == RESUMES_FROM[death]


@everywhere
def test_2_a_half_written_directory_is_no_checkpoint_and_goes(run: Run) -> None:
    disk = die(run, Death.LOCAL_WRITE)
    assert list(disk.iterdir()), "the process left something"

    assert complete_checkpoints(disk) == []
    remove_stale(disk)
    assert list(disk.iterdir()) == []


@everywhere
def test_3_the_same_node_publishes_what_it_had_written_as_its_new_attempt(run: Run) -> None:
    """Lost: nothing, if the node survives."""
    disk = die(run, Death.STAGED)
    attempt = run.claim_next()
    (local,) = complete_checkpoints(disk)
    assert local.step > run.state.committed_step

    run.checkpoints().publish(local, attempt, incarnation(attempt))

    run.check()
    assert run.go_on() == 30


@everywhere
def test_6_a_writer_that_lives_on_knows_its_own_commit_again(run: Run) -> None:
    """Lost: nothing, whether the reply was lost or the request."""

    class NoReply(DyingStore):
        def create(self, key: str, body: bytes) -> bool:
            super().create(key, body)
            raise Unavailable("the reply was lost")

    run.publish(30, store=NoReply(run.store, Death.SNAPSHOT, pytest.fail))

    run.check(run.told)
    assert [c.step for c in run.state.checkpoints] == [10, 20, 30]
    assert run.go_on() == 30


@everywhere
def test_8_a_ghost_that_wakes_after_the_next_claim_is_refused_and_takes_its_upload_back(run: Run) -> None:
    ghost = run.ledger()
    ghost.refresh()
    attempt = run.claim_next()
    run.publish(30, attempt)
    local = write_checkpoint(run.disk / "ghost", 30, files={"adapter.safetensors": b"a ghost's"})

    with pytest.raises(Fenced, match="attempt 2 is the newest, attempt 1 is fenced"):
        CheckpointStore(run.store, RUN, ghost).publish(local, 1, incarnation(1))

    run.check(run.told)
    assert leftovers(run.store, RUN, run.state) == []
    assert run.go_on() == 30


@everywhere
def test_9_a_commit_that_comes_before_the_claim_is_more_progress(run: Run) -> None:
    """The next owner decides by what it read, and its record meets a newer log."""

    class Overtaken(DyingStore):
        def create(self, key: str, body: bytes) -> bool:
            if run.state.committed_step == 20:
                run.publish(30)
            return super().create(key, body)

    slow = run.ledger(Overtaken(run.store, Death.SNAPSHOT, pytest.fail))
    slow.refresh()
    slow.append(ended(1))
    slow.append(claimed(2))

    assert run.resume(2) == 30
    run.check(run.told)
    assert run.go_on() == 30


@everywhere
def test_12_what_is_half_deleted_is_never_chosen(run: Run) -> None:
    die(run, Death.DELETING)
    assert len([key for key in run.data() if "/000000010/" in key]) == 1

    assert [c.step for c in run.state.checkpoints] == [20]
    assert [c.step for c in run.state.retired] == [10]
    assert run.go_on() == 20


@everywhere
def test_13_a_reader_whose_checkpoint_is_deleted_meanwhile_takes_the_newer_one(run: Run) -> None:
    """Lost: a download."""

    class Retired(DyingStore):
        def download(self, key: str, target: Path) -> None:
            if run.state.committed_step == 20:
                run.publish(30)
                run.checkpoints().retire([ref(10), ref(20)])
                run.checkpoints().reap(run.state)
            super().download(key, target)

    state = run.state
    reader = run.checkpoints(Retired(run.store, Death.SNAPSHOT, pytest.fail))
    checkpoint, path = reader.fetch_newest(state, run.disk / "reader")

    assert checkpoint is not None
    assert path is not None
    assert read_files(path) == contents(30)
    assert [p.name for p in (run.disk / "reader").iterdir()] == [path.name], "nothing half downloaded stays"
    assert run.state.quarantined == ()
    run.check(run.told)


@everywhere
@pytest.mark.parametrize("file", contents(30))
def test_14_a_file_that_the_disk_tore_is_never_committed(run: Run, file: str) -> None:
    """Lost: the steps since the last commit."""
    local = write_checkpoint(run.disk / "torn", 30)
    with (local.path / file).open("r+b") as torn:
        torn.truncate(7)

    with pytest.raises(Corrupt, match=f"{file}: 7 bytes, its record says"):
        run.checkpoints().publish(local, 1, incarnation(1))

    run.check(run.told)
    assert run.state.committed_step == 20
    assert run.go_on() == 20


@everywhere
@pytest.mark.parametrize("damage", [b"", b"rot", None])
def test_15_what_rotted_is_set_aside_and_the_one_before_is_taken(run: Run, damage: bytes | None) -> None:
    """Lost: one interval."""
    newest = run.state.newest
    assert newest is not None
    key = layout.committed_file(RUN, newest, "adapter.safetensors")
    run.damaged.add(key)
    if damage is None:
        run.store.delete([key])
    else:
        run.store.put(key, damage)

    assert run.go_on() == 10
    assert [spoilt for spoilt, _ in run.state.quarantined] == [ref(20)]


def test_4_parts_of_an_upload_that_never_ended_go_with_the_run(radosgw: S3Server, tmp_path: Path) -> None:
    import boto3
    from botocore.config import Config

    store = open_store(radosgw.url_of("crash-4"))
    run = Run(store, tmp_path / "disk")
    run.begin()
    key = layout.checkpoint_file(RUN, 1, incarnation(1), 30, "adapter.safetensors")
    client = boto3.client(
        "s3",
        endpoint_url=radosgw.endpoint,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    upload = client.create_multipart_upload(Bucket=radosgw.bucket, Key=f"crash-4/{key}")
    client.upload_part(
        Bucket=radosgw.bucket, Key=f"crash-4/{key}", UploadId=upload["UploadId"], PartNumber=1, Body=b"half"
    )
    assert [info.key for info in store.unfinished(layout.data_prefix(RUN))] == [key]

    assert run.go_on() == 20

    assert list(store.unfinished(layout.data_prefix(RUN))) == []
