"""Scoped credentials on a server that enforces what is signed: what a node may do, and all it may not."""

import hashlib
import itertools
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3
from support.granting import Office, caller_of, data_key, send
from support.runs import RUN, claimed, contents, ended, incarnation, read_files, write_checkpoint
from support.s3_servers import S3Server

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    Unavailable,
)
from storage.log import run_log
from storage.records import (
    Committed,
    Quarantined,
    Record,
    Retired,
    Started,
    StoredFile,
)
from storage.redaction import looks_secret, redacted
from storage.run_state import RunState
from storage.s3.presigned import Presigned
from storage.s3.store import S3Store
from storage.scoped.desk import PLACES, REREAD_BYTES, unenforced
from storage.scoped.grants import (
    Complete,
    Done,
    Given,
    Granted,
    GrantedParts,
    Limits,
    Look,
    Read,
    Refused,
    Told,
    Write,
)
from storage.url import open_store

_corners = itertools.count()
BODY = b"weights of step ten"


@pytest.fixture
def office(radosgw: S3Server) -> Iterator[Office]:
    made = Office(open_store(radosgw.url_of(f"scoped-{next(_corners)}")))
    yield made
    leftover = [info.key for info in made.store.unfinished("")]
    assert leftover == [], "uploads that nobody completed or aborted"


def write(key: str, body: bytes = BODY) -> Write:
    return Write(key=key, size_bytes=len(body), md5=md5(body))


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def granted(office: Office, asked: Write) -> Presigned:
    reply = office.ask(asked)
    assert isinstance(reply, Granted), reply
    return Presigned(reply.url, reply.headers)


def commit(step: int, body: bytes = BODY, **changes: object) -> Committed:
    file = StoredFile(
        name="adapter.safetensors", size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest()
    )
    values: dict[str, object] = {
        "attempt": 1, "incarnation": incarnation(1), "step": step, "files": (file,), "at": 1.0,
    }  # fmt: skip
    return Committed.model_validate({**values, **changes})


def test_a_node_publishes_resumes_and_commits_without_credentials(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ledger = office.node()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)  # the desk's signer has read them; whatever the node does, it has none
    assert store.get(layout.run_spec(RUN)) == b"the spec"
    ledger.append(Started(attempt=1, step=0, at=1.0))
    checkpoints = CheckpointStore(store, RUN, ledger)
    checkpoints.publish(write_checkpoint(tmp_path, 10), 1, incarnation(1))
    checkpoints.publish(write_checkpoint(tmp_path, 10), 1, incarnation(1))  # its reply was lost

    office.runs.append(RUN, ended(1))
    office.runs.append(RUN, claimed(2))
    store, ledger = office.node(caller_of(2))
    newest, path = CheckpointStore(store, RUN, ledger).fetch_newest(
        ledger.refresh(), tmp_path / "resume", attempt=2
    )
    assert newest is not None
    assert newest.step == 10
    assert path is not None
    assert read_files(path) == contents(10)
    kinds = [entry.record.kind for entry in office.runs.log(RUN).entries()]
    assert kinds == ["claimed", "started", "committed", "ended", "claimed"]


def test_the_server_enforces_what_is_signed(office: Office) -> None:
    assert unenforced(office.store, office.store.signer(), send) is None


def test_a_server_that_enforces_less_is_found_out(rclone: S3Server) -> None:
    store = open_store(rclone.url_of("unenforced"), check_then_put=True)
    assert isinstance(store, S3Store)
    assert unenforced(store, store.signer(), send) is not None
    assert list(store.list("probe/")) == []


def test_a_granted_write_takes_exactly_these_bytes_once(office: Office) -> None:
    key = data_key(10)
    signed = granted(office, write(key))
    bare = Presigned(signed.url, {k: v for k, v in signed.headers.items() if k != "If-None-Match"})
    assert send(bare, BODY) == 403, "the create-only header is missing"
    longer = Presigned(signed.url, {**signed.headers, "Content-Length": str(len(BODY) + 1)})
    assert send(longer, BODY + b"!") == 403, "another length"
    assert send(signed, BODY[::-1]) == 400, "other bytes of that length"
    other_md5 = Presigned(signed.url, {**signed.headers, "Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="})
    assert send(other_md5, BODY) == 403, "another digest"
    assert office.store.head(key) is None
    assert send(signed, BODY) == 200
    assert send(signed, BODY) == 412, "a replay"
    assert office.store.get(key) == BODY


def test_a_granted_write_is_good_for_nothing_else(office: Office) -> None:
    office.store.put(layout.run_spec("dog"), b"another run's")
    signed = granted(office, write(data_key(10)))
    elsewhere = signed.url.replace("/adapter.safetensors?", "/optimizer.safetensors?")
    assert elsewhere != signed.url
    assert send(Presigned(elsewhere, signed.headers), BODY) == 403
    parts = urllib.parse.urlsplit(signed.url)
    bucket = parts._replace(path="/" + parts.path.split("/")[1])
    http = urllib3.PoolManager()
    for method, url in (
        ("GET", signed.url),
        ("DELETE", signed.url),
        ("GET", bucket.geturl()),
        ("GET", bucket._replace(query=f"list-type=2&{parts.query}").geturl()),
        ("GET", bucket._replace(query="list-type=2").geturl()),
    ):
        assert http.request(method, url, retries=False).status == 403, (method, url)


def test_a_granted_read_reads_one_object(office: Office) -> None:
    office.store.put(layout.run_spec("dog"), b"another run's")
    store, _ = office.node()
    with pytest.raises(AccessDenied, match="no business"):
        store.get(layout.run_spec("dog"))
    signed = office.store.signer().get(layout.run_spec(RUN), 900)
    http = urllib3.PoolManager()
    assert http.request("GET", signed.url).data == b"the spec"
    assert http.request("GET", signed.url.replace(f"/{RUN}/", "/dog/")).status == 403
    assert http.request("DELETE", signed.url).status == 403
    assert send(signed, b"overwritten") == 403
    assert office.store.get(layout.run_spec(RUN)) == b"the spec"


def test_a_grant_expires(radosgw: S3Server) -> None:
    office = Office(open_store(radosgw.url_of(f"scoped-{next(_corners)}")), expires_s=1)
    key = data_key(10)
    signed = granted(office, write(key))
    deadline = time.monotonic() + 30
    # Asked with a wrong body, the server says 400 while the signature holds: nothing is written meanwhile.
    while (status := send(signed, BODY[::-1])) != 403:
        assert status == 400
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert send(signed, BODY) == 403
    assert office.store.head(key) is None


def test_a_large_file_goes_in_parts_and_goes_on_after_a_cut(office: Office, tmp_path: Path) -> None:
    file = tmp_path / "optimizer"
    file.write_bytes(bytes(range(256)) * 4096 * 12)  # 12 MB: S3 takes no part below 5 MB but the last
    key = data_key(10, "optimizer")
    store, _ = office.node(multipart_bytes=1 << 20, part_bytes=5 << 20)
    sent: list[int] = []
    put = store._http.put

    def failing(where: str, signed: Presigned, body: object) -> int:
        sent.append(1)
        if len(sent) == 2:
            raise Unavailable("cut")
        return put(where, signed, body)  # type: ignore[arg-type]

    store._http.put = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(Unavailable, match="cut"):
        store.put(key, file)
    assert office.store.head(key) is None
    assert len(sent) == 3
    store.put(key, file)
    assert len(sent) == 4, "only the part that was cut is sent again"
    store.put(key, file)
    assert len(sent) == 4
    office.store.download(key, tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == file.read_bytes()


def test_parts_that_are_not_what_was_granted_are_never_completed(office: Office) -> None:
    first, last = b"a" * (5 << 20), b"end"
    key = data_key(10)
    asked = Write(
        key=key,
        size_bytes=len(first + last),
        md5=md5(first + last),
        part_bytes=5 << 20,
        parts=(md5(first), md5(last)),
    )
    reply = office.ask(asked)
    assert isinstance(reply, GrantedParts)
    one, two = (Presigned(part.url, part.headers) for part in reply.parts if part)
    assert send(one, b"b" * (5 << 20)) == 400
    assert send(Presigned(one.url.replace("partNumber=1", "partNumber=3"), one.headers), first) == 403
    assert send(two, last) == 200
    refusal = office.ask(Complete(key=key))
    assert isinstance(refusal, Refused)
    assert "parts are missing" in refusal.reason
    assert send(one, first) == 200
    assert office.ask(Complete(key=key)) == Done()
    assert office.ask(asked) == Done()
    assert office.store.head(key) is not None


def in_parts(key: str, body: bytes, *parts: bytes) -> Write:
    return Write(
        key=key, size_bytes=len(body), md5=md5(body), part_bytes=5 << 20, parts=tuple(map(md5, parts))
    )


def send_parts(reply: object, *parts: bytes) -> int:
    """Send the parts that are granted; return how many those are."""
    assert isinstance(reply, GrantedParts), reply
    todo = [(part, body) for part, body in zip(reply.parts, parts, strict=True) if part]
    assert all(send(Presigned(part.url, part.headers), body) == 200 for part, body in todo)
    return len(todo)


@pytest.mark.parametrize("again", [False, True], ids=["its upload", "an upload named as it"])
def test_no_upload_becomes_of_a_committed_file(office: Office, again: bool) -> None:
    """Parts that were sent before the file was sent whole, other bytes than were committed."""
    other, key = BODY[::-1], data_key(10)
    send_parts(office.ask(in_parts(key, other, other)), other)
    store, ledger = office.node()
    store.put(key, BODY)
    ledger.append(commit(10))
    if again:
        assert office.ask(in_parts(key, BODY, other)) == Done()
    assert isinstance(office.ask(Complete(key=key)), Refused)
    assert office.store.get(key) == BODY


def test_an_upload_that_another_request_left_is_not_completed_over_a_committed_file(office: Office) -> None:
    other, key = BODY[::-1], data_key(10)
    office.store.put(key, BODY)
    office.ask(write(key))
    upload = office.store.signer().begin(key)
    signed = office.store.signer().part(key, upload, 1, len(other), md5(other), 900)
    assert send(signed, other) == 200
    _, ledger = office.node()
    ledger.append(commit(10))
    desk = office.desk._desks[RUN]
    desk.uploads[key] = upload
    desk.given[key] = Given(write=in_parts(key, other, other), until=900.0)
    refusal = office.ask(Complete(key=key))
    assert isinstance(refusal, Refused)
    assert refusal.error == "AccessDenied"
    assert office.store.get(key) == BODY
    office.store.abort_uploads("runs/")


def test_no_part_is_sent_again_because_the_store_could_not_complete_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (b"a" * (5 << 20), b"end")
    asked = in_parts(data_key(10), b"".join(parts), *parts)
    assert send_parts(office.ask(asked), *parts) == 2

    def unavailable(*_: object) -> None:
        raise Unavailable("503")

    with monkeypatch.context() as patch:
        patch.setattr(office.desk._signer, "complete", unavailable)
        refusal = office.ask(Complete(key=asked.key))
        assert isinstance(refusal, Refused)
        assert refusal.error == "Unavailable"
    assert send_parts(office.ask(asked), *parts) == 0
    assert office.ask(Complete(key=asked.key)) == Done()
    assert office.store.get(asked.key) == b"".join(parts)


def test_a_changed_large_file_begins_anew(office: Office) -> None:
    key = data_key(10)

    def asked(last: bytes) -> Write:
        body = b"a" * (5 << 20) + last
        return Write(
            key=key,
            size_bytes=len(body),
            md5=md5(body),
            part_bytes=5 << 20,
            parts=(md5(body[: 5 << 20]), md5(last)),
        )

    office.ask(asked(b"old"))
    office.ask(asked(b"new"))
    assert len(list(office.store.unfinished("runs/"))) == 1
    office.restart()
    office.ask(asked(b"new"))
    assert len(list(office.store.unfinished("runs/"))) == 1, (
        "the new controller knows nothing of the old one's"
    )
    office.store.abort_uploads("runs/")


def test_a_ghost_gets_nothing_more(office: Office) -> None:
    store, ledger = office.node()
    late = granted(office, write(data_key(20)))
    office.runs.append(RUN, ended(1))
    office.runs.append(RUN, claimed(2))
    for attempt in (
        lambda: store.put(data_key(10), BODY),
        lambda: store.put(layout.events_key(RUN, 1, 0), b"{}\n"),
        lambda: store.get(layout.run_spec(RUN)),
        lambda: ledger.append(commit(10)),
        ledger.refresh,
    ):
        with pytest.raises(Fenced, match="attempt 1 is not running"):
            attempt()
    # What was signed before may still be sent, to the ghost's own prefix, where nothing is ever resumed from.
    assert send(late, BODY) == 200
    swept = CheckpointStore(office.store, RUN, office.runs.log(RUN)).sweep_orphans(office.runs.refreshed(RUN))
    assert swept == 1
    assert office.store.head(data_key(20)) is None


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


def test_a_large_file_is_not_read_back_to_learn_that_other_bytes_are_asked_for(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"a" * (REREAD_BYTES + 1)
    office.store.put(data_key(10), body)
    monkeypatch.setattr(office.store, "download", lambda *_: pytest.fail("it is read"))
    first, others, last = (b"b" * (REREAD_BYTES // 2),) * 2 + (b"b",)
    parts = in_parts(data_key(10), body, first, others, last).model_copy(update={"part_bytes": len(first)})
    assert isinstance(office.ask(parts), GrantedParts)
    office.store.put(data_key(10), body)
    assert isinstance(office.ask(write(data_key(10), b"b" * len(body))), Granted)
    office.store.put(data_key(10), body)
    assert office.ask(write(data_key(10), body)) == Done()


def test_who_waits_at_a_desk_holds_up_nobody_else(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    granted(office, write(data_key(10)))
    desk = office.desk._desks[RUN]
    monkeypatch.setattr("storage.scoped.desk.TURN_S", 0.01)
    with desk.lock:
        late = office.ask(write(data_key(10)))
        assert isinstance(late, Refused)
        assert late.error == "Unavailable"
        assert isinstance(office.ask(Look()), Told)
        assert isinstance(office.ask(Read(key=layout.run_spec(RUN))), Granted)
    monkeypatch.setattr("storage.scoped.desk.TURN_S", 30.0)
    for _ in range(PLACES):
        desk.places.acquire()
    with desk.lock:
        many = office.ask(write(data_key(10)))
    assert isinstance(many, Refused)
    assert "are being answered" in many.reason
    desk.places.release(PLACES)
    granted(office, write(data_key(10)))


def test_what_a_dead_node_left_is_swept(office: Office) -> None:
    """The node dies between its grant and its commit: the file is sent, half sent in parts, or not at all."""
    store, _ = office.node()
    store.put(data_key(10), BODY)
    granted(office, write(data_key(20)))
    body = b"a" * (5 << 20)
    office.ask(
        Write(key=data_key(30), size_bytes=len(body), md5=md5(body), part_bytes=5 << 20, parts=(md5(body),))
    )
    office.runs.append(RUN, ended(1))
    office.runs.append(RUN, claimed(2))
    checkpoints = CheckpointStore(office.store, RUN, office.runs.log(RUN))
    assert checkpoints.sweep_orphans(office.runs.refreshed(RUN)) == 1
    assert list(office.store.list(layout.data_prefix(RUN))) == []
    assert len(list(office.store.unfinished("runs/"))) == 1
    other, _ = office.node(caller_of(2))
    other.put(data_key(10, attempt=2), BODY)
    assert list(office.store.unfinished("runs/")) == [], (
        "the next attempt's first grant ends the dead one's upload"
    )


def test_batches_and_samples_are_shipped(office: Office) -> None:
    store, _ = office.node()
    events, sample = layout.events_key(RUN, 1, 0), layout.sample_key(RUN, 10, "a.png")
    store.put(events, b"one line\n")
    store.put(events, b"one line\nand one more\n")  # the batch has grown since a try whose answer was lost
    store.put(layout.log_text_key(RUN, 1, 0), b"text")
    store.put(sample, b"picture")
    assert office.store.get(events) == b"one line\nand one more\n"
    store.put(data_key(10), BODY)
    _, ledger = office.node()
    ledger.append(commit(10))
    office.runs.append(RUN, ended(1))
    office.runs.append(RUN, claimed(2))
    second, _ = office.node(caller_of(2))
    second.put(sample, b"another picture")
    assert office.store.get(sample) == b"picture", "a step before the attempt's first: an older one's picture"
    with pytest.raises(AccessDenied):
        second.put(events, b"forged")


def test_no_url_is_ever_said(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    reply = office.ask(write(data_key(10)))
    assert isinstance(reply, Granted)
    signature = urllib.parse.parse_qs(urllib.parse.urlsplit(reply.url).query)["X-Amz-Signature"][0]
    assert signature not in repr(reply)
    signed = Presigned(reply.url, reply.headers)
    assert signature not in repr(signed)
    assert looks_secret(reply.url)
    assert signature not in redacted(f"GET {reply.url} 403")
    assert signature not in redacted(urllib.parse.quote(reply.url, safe=""))
    nobody = Presigned(reply.url.replace(str(urllib.parse.urlsplit(reply.url).port), "1"), reply.headers)
    with pytest.raises(Unavailable) as error:
        send(nobody, BODY)
    assert signature not in str(error.value)
    assert error.value.__cause__ is None
