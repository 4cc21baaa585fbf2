"""What is committed under grants is true, and no file of it is ever replaced."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.granted_files import BODY, commit, md5, write
from support.granting import Office, caller_of, data_key
from support.runs import RUN, claimed, ended, incarnation, write_checkpoint

from storage.checkpoints import CheckpointStore
from storage.errors import AccessDenied, Corrupt, Fenced, Unavailable
from storage.log import run_log
from storage.records import Quarantined, Record, Retired, Started
from storage.run_state import RunState
from storage.scoped.grants import GrantedParts, Limits, Refused, Write


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (commit(10, BODY + b"!"), "bytes, its record says"),
        (commit(10, BODY[::-1]), "sha256"),
        (commit(11), "send it again"),
        (commit(10, attempt=2), "another attempt"),
        (commit(10, incarnation="0" * 8), "another incarnation"),
        (commit(10, files=()), "does not follow"),
        (commit(500), "does not follow"),
        (Started(attempt=1, step=7, at=1.0), "does not follow"),
        (Started(attempt=2, step=0, at=1.0), "another attempt"),
        (claimed(2), "may not append"),
        (ended(1), "may not append"),
        (Retired(checkpoints=(), at=1.0), "may not append"),
        (
            Quarantined(checkpoint=commit(10).ref, attempt=None, reason="", at=1.0),
            "may not append",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_record_that_is_not_true_is_refused(office: Office, record: object, why: str) -> None:
    office.runs.limit = Limits(last_step=100)
    store, ledger = office.node()
    store.put(data_key(10), BODY)
    before = len(office.runs.log(RUN).entries())
    with pytest.raises((AccessDenied, Corrupt, Fenced, Unavailable), match=why):
        ledger.append(record)  # type: ignore[arg-type]
    office.runs.refreshed(RUN)
    assert len(office.runs.log(RUN).entries()) == before
    assert sum(office.desk.refusals.values()) == 1
    ledger.append(commit(10))


def test_a_commit_of_a_file_that_vanished_or_was_replaced_is_refused(office: Office) -> None:
    store, ledger = office.node()
    store.put(data_key(10), BODY)
    office.store.delete([data_key(10)])
    with pytest.raises(Corrupt, match="not there"):
        ledger.append(commit(10))
    office.store.put(data_key(10), BODY[::-1])  # as a store might that loses or confuses objects
    with pytest.raises(Corrupt, match="sha256"):
        ledger.append(commit(10))
    store.put(data_key(10), BODY)
    ledger.append(commit(10))


def test_a_committed_file_is_never_replaced(office: Office) -> None:
    store, ledger = office.node()
    store.put(data_key(10), BODY)
    ledger.append(commit(10))
    with pytest.raises(AccessDenied, match="committed"):
        store.put(data_key(10), b"something else")
    with pytest.raises(Fenced):
        ledger.append(commit(9))
    assert office.store.get(data_key(10)) == BODY


def test_a_file_whose_commit_the_controller_has_not_heard_of_is_never_replaced(office: Office) -> None:
    store, _ = office.node()
    store.put(data_key(10), BODY)
    run_log(office.store, RUN).append(commit(10))  # it was written, and its reply lost
    with pytest.raises(AccessDenied, match="committed"):
        store.put(data_key(10), b"something else")
    assert office.store.get(data_key(10)) == BODY


def test_a_file_is_never_replaced_by_one_that_waited_while_it_was_committed(office: Office) -> None:
    store, ledger = office.node()
    store.put(data_key(10), BODY)
    verify, verifying, looked = office.desk._verify, threading.Event(), threading.Event()

    def slow(*args: object) -> None:
        verifying.set()
        assert looked.wait(30)
        verify(*args)  # type: ignore[arg-type]

    office.desk._verify = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        committing = pool.submit(ledger.append, commit(10))
        assert verifying.wait(30)
        known = office.runs.state

        def looking(run_id: str) -> RunState:
            state = known(run_id)
            looked.set()
            return state

        office.runs.state = looking  # type: ignore[method-assign]
        replacing = pool.submit(store.put, data_key(10), b"something else")
        assert committing.result(30).committed_step == 10
        with pytest.raises(AccessDenied, match="committed"):
            replacing.result(30)
    assert office.store.get(data_key(10)) == BODY


def test_a_ghosts_late_request_takes_nothing_from_the_attempt_after_it(office: Office) -> None:
    as_it_was = office.runs.refreshed(RUN)
    office.runs.append(RUN, ended(1))
    office.runs.append(RUN, claimed(2))
    body = b"a" * (5 << 20)
    part = Write(
        key=data_key(10, attempt=2),
        size_bytes=len(body),
        md5=md5(body),
        part_bytes=5 << 20,
        parts=(md5(body),),
    )
    assert isinstance(office.ask(part, caller_of(2)), GrantedParts)
    office.runs.state = lambda run_id: as_it_was  # type: ignore[method-assign]
    refusal = office.ask(write(data_key(10)))  # it was found to be running just before the second was claimed
    assert isinstance(refusal, Refused)
    assert refusal.error == "Fenced"
    assert len(list(office.store.unfinished("runs/"))) == 1
    office.store.abort_uploads("runs/")


def test_a_file_not_yet_committed_may_be_sent_with_other_bytes(office: Office) -> None:
    store, ledger = office.node()
    store.put(data_key(10), b"packed in another way")
    store.put(data_key(10, "left-over"), b"not named later")
    store.put(data_key(10), BODY)
    ledger.append(commit(10))
    assert office.store.get(data_key(10)) == BODY
    assert office.store.head(data_key(10, "left-over")) is None


def test_old_uncommitted_files_make_room_and_committed_ones_stay(office: Office) -> None:
    store, ledger = office.node()
    store.put(data_key(10), BODY)
    ledger.append(commit(10))
    store.put(data_key(10), BODY)  # published again: the reply to the commit was lost
    store.put(data_key(15), BODY)
    ledger.append(commit(15, resumable=False))
    store.put(data_key(15), BODY)  # a salvage, whose whole checkpoint never comes
    store.put(data_key(20), BODY)  # superseded before it was whole
    office.now += office.expires_s + 1
    store.put(data_key(30), BODY)
    assert [office.store.head(data_key(step)) is not None for step in (10, 15, 20, 30)] == [
        True,
        True,
        False,
        True,
    ]


def test_a_controller_that_starts_again_takes_the_commit_after_the_files_were_named_again(
    office: Office, tmp_path: Path
) -> None:
    """The node does so itself: it remembers what it has sent, and never sends it again."""
    store, ledger = office.node()
    checkpoints = CheckpointStore(store, RUN, ledger)
    local = write_checkpoint(tmp_path, 10)
    append = ledger.append

    def away(record: Record) -> RunState:
        raise Unavailable("the controller is away")

    ledger.append = away  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="is away"):
        checkpoints.publish(local, 1, incarnation(1))
    office.restart()
    ledger.append = append  # type: ignore[method-assign]
    store._http.put = lambda key, *_: pytest.fail(f"{key}: it is there already")  # type: ignore[method-assign]
    checkpoints.publish(local, 1, incarnation(1))
    assert office.runs.refreshed(RUN).committed_step == 10


def test_a_controller_that_starts_again_refuses_a_commit_of_what_it_was_never_asked_for(
    office: Office,
) -> None:
    office.node()[0].put(data_key(10), BODY)
    office.restart()
    with pytest.raises(Unavailable, match="send it again"):
        office.node()[1].append(commit(10))


def test_the_whole_of_a_salvaged_checkpoint_is_committed(office: Office, tmp_path: Path) -> None:
    store, ledger = office.node()
    checkpoints = CheckpointStore(store, RUN, ledger)
    local = write_checkpoint(tmp_path, 10)
    checkpoints.publish(local, 1, incarnation(1), only={"adapter.safetensors"})
    checkpoints.publish(local, 1, incarnation(1))
    state = office.runs.refreshed(RUN)
    assert (state.committed_step, state.salvaged) == (10, ())
