"""How an S3 server's answers become ours, shown on a server that says what a test tells it to."""

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest

from storage.errors import (
    AccessDenied,
    NotFound,
    StorageError,
    Unavailable,
)
from storage.s3.client import S3Client
from storage.s3.deadline import within
from storage.s3.store import REQUEST_S, S3Store
from storage.s3.uplink import PART_BYTES
from storage.url import open_store


@dataclass
class Answer:
    """One scripted answer. ``cut`` closes the connection after so many bytes of the body."""

    status: int
    code: str = ""
    body: bytes = b""
    cut: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Script:
    """Answers still to give, and the requests that came."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    endpoint: str = ""

    @property
    def methods(self) -> list[str]:
        return [method for method, _, _, _ in self.requests]


@pytest.fixture
def script() -> Iterator[Script]:
    told = Script()

    class Scripted(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            told.requests.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
            answer = told.answers.pop(0) if len(told.answers) > 1 else told.answers[0]
            body = answer.body or f"<Error><Code>{answer.code}</Code></Error>".encode() * bool(answer.code)
            self.send_response_only(answer.status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: answer.cut])
            self.close_connection = answer.cut is not None

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    told.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(script: Script, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey0001")
    opened = open_store(f"s3://loras/team?endpoint={script.endpoint}&region=us-east-1")
    assert isinstance(opened, S3Store)
    return opened


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", AccessDenied),
        (403, "InvalidAccessKeyId", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (403, "RequestTimeTooSkewed", AccessDenied),
        (404, "NoSuchBucket", AccessDenied),
        (501, "NotImplemented", AccessDenied),
        (500, "InternalError", Unavailable),
        (503, "SlowDown", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (400, "RequestTimeout", Unavailable),
        (400, "BadDigest", Unavailable),
    ],
)
def test_an_answer_says_whether_trying_again_helps(
    store: S3Store, script: Script, status: int, code: str, kind: type[StorageError]
) -> None:
    script.answers = [Answer(status, code)]
    with pytest.raises(StorageError) as failed:
        store.create("k", b"x")
    assert type(failed.value) is kind
    assert str(failed.value).startswith(f"k in s3://loras/team?endpoint={script.endpoint}")
    assert code in str(failed.value)
    assert "testsecretkey" not in str(failed.value)


def test_a_listing_of_everything_that_is_refused_names_the_store(store: S3Store, script: Script) -> None:
    script.answers = [Answer(403, "AccessDenied")]
    with pytest.raises(AccessDenied) as failed:
        list(store.list(""))
    assert str(failed.value).startswith(store.url)


def test_create_is_sent_once_conditionally_and_with_its_digest(store: S3Store, script: Script) -> None:
    script.answers = [Answer(503, "SlowDown")]
    with pytest.raises(Unavailable):
        store.create("k", b"x")
    ((method, path, headers, body),) = script.requests
    assert (method, path, body) == ("PUT", "/loras/team/k", b"x")
    assert headers["If-None-Match"] == "*"
    assert headers["Content-MD5"] == "ndTkYSaMgDT1yFZOFVxnpg=="
    assert not [name for name in headers if "checksum" in name.lower() or "trailer" in name.lower()]


def test_other_writes_are_repeated(store: S3Store, script: Script) -> None:
    script.answers = [Answer(503, "SlowDown"), Answer(200)]
    store.put("k", b"x")
    assert script.methods == ["PUT", "PUT"]
    assert [headers["Content-MD5"] for _, _, headers, _ in script.requests] == [
        "ndTkYSaMgDT1yFZOFVxnpg=="
    ] * 2


def test_a_server_that_lists_from_the_beginning_is_not_believed(store: S3Store, script: Script) -> None:
    found = "".join(f"<Contents><Key>team/log/{n}</Key><Size>1</Size></Contents>" for n in range(3))
    script.answers = [Answer(200, body=f"<ListBucketResult>{found}</ListBucketResult>".encode())]
    assert [info.key for info in store.list("log/", after="log/0")] == ["log/1", "log/2"]
    assert "start-after=team%2Flog%2F0" in script.requests[0][1]


def test_a_taken_key_is_not_an_error(store: S3Store, script: Script) -> None:
    script.answers = [Answer(412, "PreconditionFailed")]
    assert store.create("k", b"x") is False


def test_a_conflict_is_settled_by_looking(store: S3Store, script: Script) -> None:
    script.answers = [Answer(409, "ConditionalRequestConflict"), Answer(200, headers={"ETag": '"x"'})]
    assert store.create("k", b"x") is False
    script.answers = [Answer(409, "ConditionalRequestConflict"), Answer(404)]
    with pytest.raises(Unavailable, match="conflicting creates, none has won"):
        store.create("k", b"x")


def test_a_reply_that_never_comes_leaves_the_outcome_unknown(store: S3Store, script: Script) -> None:
    script.answers = [Answer(200, body=b"half a reply", cut=3)]
    with pytest.raises(Unavailable):
        store.create("k", b"x")


def test_an_object_that_is_not_there_is_not_found(store: S3Store, script: Script, tmp_path: Path) -> None:
    script.answers = [Answer(404, "NoSuchKey")]
    with pytest.raises(NotFound, match=r"k in s3://.*: no such object"):
        store.get("k")
    with pytest.raises(NotFound):
        store.download("k", tmp_path / "k")
    assert store.head("k") is None


def test_a_download_that_is_cut_goes_on_where_it_was(store: S3Store, script: Script, tmp_path: Path) -> None:
    whole = bytes(range(250)) * 40
    rest = {"Content-Range": "bytes 7000-9999/10000"}
    script.answers = [Answer(200, body=whole, cut=7000), Answer(206, body=whole[7000:], headers=rest)]
    store.download("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == whole
    assert script.requests[1][2]["Range"] == "bytes=7000-"


def test_a_download_that_is_cut_again_and_again_is_given_up(
    store: S3Store, script: Script, tmp_path: Path
) -> None:
    script.answers = [Answer(200, body=b"x" * 5000, cut=0)]
    with pytest.raises(Unavailable):
        store.download("k", tmp_path / "k")
    assert len(script.requests) == 4


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (404, "NoSuchUpload")])
def test_a_server_that_cannot_list_uploads_has_none_to_abort(
    status: int, code: str, store: S3Store, script: Script
) -> None:
    script.answers = [Answer(status, code)]
    assert store.abort_uploads("runs/a/data/") == 0

    script.answers = [Answer(403, "AccessDenied")]
    with pytest.raises(AccessDenied):
        store.abort_uploads("runs/a/data/")


def test_looking_before_writing_takes_a_free_key_and_leaves_a_taken_one(
    script: Script, store: S3Store
) -> None:
    store.check_then_put = True
    script.answers = [Answer(404), Answer(200)]
    assert store.create("k", b"x") is True
    script.answers = [Answer(200)]
    assert store.create("k", b"x") is False
    assert script.methods == ["HEAD", "PUT", "HEAD"]


@pytest.mark.parametrize("status", [200, 403, 404])
def test_the_servers_clock_is_read_from_any_answer(store: S3Store, script: Script, status: int) -> None:
    script.answers = [Answer(status, headers={"Date": "Sat, 21 Nov 2026 14:28:22 GMT"})]
    assert store.server_time() == datetime(2026, 11, 21, 14, 28, 22, tzinfo=UTC)


@pytest.mark.parametrize("date", [{}, {"Date": "yesterday"}])
def test_an_answer_without_a_date_tells_no_time(store: S3Store, script: Script, date: dict[str, str]) -> None:
    script.answers = [Answer(200, headers=date)]
    assert store.server_time() is None


def test_credentials_that_have_been_replaced_are_taken_up_by_the_refused_request(
    store: S3Store, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a create: a refusal says for sure that nothing was written."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY002")
    script.answers = [Answer(403, "InvalidAccessKeyId"), Answer(200)]
    assert store.create("k", b"x") is True
    assert [
        headers["Authorization"].split("Credential=")[1].split("/")[0] for _, _, headers, _ in script.requests
    ] == ["TESTACCESSKEY001", "TESTACCESSKEY002"]


def test_a_listing_goes_on_where_a_page_failed(store: S3Store, script: Script) -> None:
    def page(key: str, more: str) -> bytes:
        return (
            f"<ListBucketResult><Contents><Key>team/{key}</Key><Size>1</Size></Contents>{more}"
            "</ListBucketResult>"
        ).encode()

    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"
    script.answers = [
        Answer(200, body=page("a", more)),
        Answer(503, "SlowDown"),
        Answer(200, body=page("b", "")),
    ]
    assert [info.key for info in store.list("")] == ["a", "b"]
    assert ["continuation-token=next" in path for _, path, _, _ in script.requests] == [False, True, True]


@pytest.mark.parametrize(
    ("marker", "requests"), [("<NextContinuationToken>same</NextContinuationToken>", 2), ("", 1)]
)
def test_a_listing_that_cannot_go_on_is_an_error_and_not_the_end(
    marker: str, requests: int, store: S3Store, script: Script
) -> None:
    page = f"<ListBucketResult><IsTruncated>true</IsTruncated>{marker}</ListBucketResult>"
    script.answers = [Answer(200, body=page.encode())]
    with pytest.raises(Unavailable, match=rf"^runs/a in {re.escape(store.url)}: the server has more to list"):
        list(store.list("runs/a"))
    assert len(script.requests) == requests


def test_a_server_that_does_not_name_what_it_took_is_an_error_of_ours(
    store: S3Store, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x" * (PART_BYTES + 1))
    begun = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
    script.answers = [Answer(200, body=begun), Answer(200)]
    with pytest.raises(Unavailable, match="does not name the part"):
        store.put("k", tmp_path / "file")
    script.answers = [Answer(200)]
    with pytest.raises(Unavailable, match="does not name the upload"):
        open_store(store.url).put("k", tmp_path / "file")


def test_what_is_read_into_memory_may_take_as_long_as_it_arrives(
    script: Script, monkeypatch: pytest.MonkeyPatch, store: S3Store
) -> None:
    """However large it is: each piece has a time of its own."""
    given: list[float] = []

    def noted(limit_s: float) -> AbstractContextManager[None]:
        given.append(limit_s)
        return within(limit_s)

    monkeypatch.setattr("storage.s3.ranged_get.within", noted)
    body = b"x" * (3 << 20)
    script.answers = [Answer(200, body=body)]
    assert store.get("k") == body
    assert len(given) == 4, "three pieces and the end"
    assert min(given) > REQUEST_S


def test_a_read_into_memory_that_is_cut_goes_on_where_it_was(store: S3Store, script: Script) -> None:
    script.answers = [
        Answer(200, body=b"0123456789", cut=4, headers={"ETag": '"v1"'}),
        Answer(206, body=b"456789", headers={"ETag": '"v1"', "Content-Range": "bytes 4-9/10"}),
    ]
    assert store.get("k") == b"0123456789"


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        ("https://fly.storage.tigris.dev", True),
        ("https://t3.storage.dev", True),
        ("https://nottigris.dev.example.org", False),
    ],
)
def test_tigris_is_asked_for_what_was_written_last(
    endpoint: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    client = S3Client(endpoint, "auto").requests
    sent: list[AWSPreparedRequest] = []

    def stop(request: AWSPreparedRequest, **_: object) -> None:
        sent.append(request)
        raise InterruptedError

    client.meta.events.register_first("before-send.s3", stop)
    with pytest.raises(InterruptedError):
        client.put_object(Bucket="loras", Key="key", Body=b"")
    assert ("X-Tigris-Consistent" in sent[0].headers) == asked
    presigned = client.generate_presigned_url("get_object", Params={"Bucket": "loras", "Key": "key"})
    assert "tigris-consistent" not in presigned  # who uses it would have to send the header
