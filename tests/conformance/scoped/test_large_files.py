"""Files that are sent in parts under grants: completed as they were granted, or never."""

from pathlib import Path

import pytest
from support.granted_files import BODY, commit, md5, write
from support.granting import Office, data_key, send
from support.runs import RUN

from storage.errors import Unavailable
from storage.s3.presigned import Presigned
from storage.scoped.desk import REREAD_BYTES
from storage.scoped.grants import Complete, Done, Given, Granted, GrantedParts, Refused, Write


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
