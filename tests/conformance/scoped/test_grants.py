"""Scoped credentials on a server that enforces what is signed: what a node may do, and all it may not."""

import time
import urllib.parse
from pathlib import Path

import pytest
import urllib3
from support.granted_files import BODY, commit, md5, write
from support.granting import Office, caller_of, data_key, send
from support.runs import RUN, claimed, contents, ended, incarnation, read_files, write_checkpoint
from support.s3_servers import S3Server

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import AccessDenied, Fenced, Unavailable
from storage.records import Started
from storage.redaction import looks_secret, redacted
from storage.s3.presigned import Presigned
from storage.s3.store import S3Store
from storage.scoped.desk import PLACES, unenforced
from storage.scoped.grants import Granted, Look, Read, Refused, Told, Write
from storage.url import open_store


def granted(office: Office, asked: Write) -> Presigned:
    reply = office.ask(asked)
    assert isinstance(reply, Granted), reply
    return Presigned(reply.url, reply.headers)


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
    office = Office(open_store(radosgw.url_of("scoped-expires")), expires_s=1)
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
