"""What every store must do, shown on a dict, a folder and three real S3 servers, with and without TLS."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from support.fault_proxy import FaultProxy
from support.s3_servers import S3Server, free_ports

from storage.errors import (
    AccessDenied,
    InvalidName,
    NotFound,
    Unavailable,
)
from storage.object_store import ObjectInfo, ObjectStore
from storage.probe import open_probed, race_probe, write_check
from storage.s3.store import S3Store
from storage.url import open_store

BIG_BYTES = (64 << 20) + 12345
"""Too much for one request, however fast the server."""
AWKWARD = ("a b/c+d%20e", "a-b/c", "a/b", "a/b.json", "ä/ö☃", "q?x=1&y=2#f", "~tilde'(1)*!")


def keys(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, after)]


def test_what_was_put_is_read_listed_and_measured(store: ObjectStore, tmp_path: Path) -> None:
    store.put("runs/a/spec.json", b"one")
    store.put("runs/a/empty", b"")

    assert store.get("runs/a/spec.json") == b"one"
    assert store.head("runs/a/spec.json") == ObjectInfo("runs/a/spec.json", 3)
    assert store.get("runs/a/empty") == b""
    assert list(store.list("runs/")) == [ObjectInfo("runs/a/empty", 0), ObjectInfo("runs/a/spec.json", 3)]
    store.download("runs/a/spec.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"one"


def test_a_second_put_replaces_the_object(store: ObjectStore) -> None:
    store.put("k", b"a long first body")
    store.put("k", b"two")

    assert store.get("k") == b"two"
    assert list(store.list("")) == [ObjectInfo("k", 3)]


def test_an_object_that_is_not_there_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    store.put("a/b", b"x")

    for missing in ("nothing", "a", "a/b/c/d", "a/bb"):
        with pytest.raises(NotFound, match="no such object"):
            store.get(missing)
        with pytest.raises(NotFound):
            store.download(missing, tmp_path / "target")
        assert store.head(missing) is None
    assert keys(store, "nothing/") == []


def test_create_takes_a_free_key_once(store: ObjectStore) -> None:
    assert store.create("log/0.json", b"first") is True
    assert store.create("log/0.json", b"second") is False
    assert store.create("log/0.json", b"first") is False
    assert store.get("log/0.json") == b"first"

    store.delete(["log/0.json"])
    assert store.create("log/0.json", b"third") is True
    assert store.get("log/0.json") == b"third"


def test_listing_is_in_key_order_by_prefix_and_after_a_key(store: ObjectStore) -> None:
    written = ["log/000.json", "log/001.json", "log/010.json", "log-a", "log/sub/x", "logs/0", "other"]
    for key in written:
        store.put(key, b"x")

    assert keys(store) == sorted(written)
    assert keys(store, "log/") == ["log/000.json", "log/001.json", "log/010.json", "log/sub/x"]
    assert keys(store, "log/00") == ["log/000.json", "log/001.json"]
    assert keys(store, "log") == sorted(k for k in written if k.startswith("log"))
    assert keys(store, "log/", after="log/001.json") == ["log/010.json", "log/sub/x"]
    assert keys(store, "log/", after="log/005.json") == ["log/010.json", "log/sub/x"]
    assert keys(store, "log/", after="log/sub/x") == []


def test_a_listing_longer_than_a_page_is_whole(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.s3.store.PAGE_KEYS", 3)
    expected = [f"many/{n:05d}" for n in range(10)]
    for key in expected:
        store.put(key, b"x")

    assert keys(store, "many/") == expected
    assert keys(store, "many/", after="many/00001") == expected[2:]
    assert keys(store, "many/", after="many/00007") == expected[8:]


def test_awkward_but_legal_keys_survive(store: ObjectStore) -> None:
    for key in AWKWARD:
        store.put(key, key.encode())

    assert keys(store) == sorted(AWKWARD)
    assert [store.get(key).decode() for key in AWKWARD] == list(AWKWARD)
    assert keys(store, "a b/", after="a b/a") == ["a b/c+d%20e"]
    store.delete(AWKWARD)
    assert keys(store) == []


def test_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    store.put("data/1/a", b"x")
    store.put("data/2/a", b"x")

    store.delete(["data/1/a", "data/1/never", "nowhere/at/all", "data/1/a"])

    assert keys(store) == ["data/2/a"]


def test_a_file_of_several_parts_arrives_whole(store: ObjectStore, tmp_path: Path) -> None:
    body = os.urandom(BIG_BYTES)
    (tmp_path / "big").write_bytes(body)
    (tmp_path / "small").write_bytes(body[:1000])

    store.put("big", tmp_path / "big")
    store.put("small", tmp_path / "small")

    assert store.head("big") == ObjectInfo("big", len(body))
    store.download("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == body
    assert store.get("small") == body[:1000]


@pytest.mark.parametrize("store", ["rclone", "radosgw"], indirect=True)
def test_uploads_that_a_dead_writer_left_are_aborted_under_a_prefix_and_nothing_else(
    store: S3Store, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def begin(key: str) -> None:
        store._client.requests.create_multipart_upload(Bucket=store._bucket, Key=store._key(key))

    store.put("runs/a/data/1", b"an object")
    for key in ("runs/a/data/2", "runs/a/data/3", "runs/b/data/1"):
        begin(key)

    aborted = store.abort_uploads("runs/a/data/")

    if request.node.callspec.params["store"] == "radosgw":
        assert aborted == 2
        assert store.abort_uploads("") == 1, "that of the other run was left alone"
    assert store.abort_uploads("runs/a/data/") == 0
    assert keys(store) == ["runs/a/data/1"]


def test_a_reader_sees_all_of_an_object_or_none_of_it(store: ObjectStore) -> None:
    bodies = [bytes([n]) * 20_000 for n in range(20)]
    store.put("k", bodies[0])
    done, at_work = threading.Event(), threading.Barrier(3, timeout=60)

    def read() -> None:
        at_work.wait()
        while not done.is_set():
            assert store.get("k") in bodies

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        at_work.wait()
        for body in bodies:
            store.put("k", body)
        done.set()
        for reader in readers:
            reader.result()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/abs",
        "a//b",
        "a/",
        "../up",
        "a/../b",
        "a/./b",
        "a\\b",
        "a\0b",
        "a\nb",
        "k" * 256,
        "k/" * 450 + "k",
    ],
)
def test_a_key_that_is_no_plain_path_is_refused(store: ObjectStore, key: str) -> None:
    for refused in (
        lambda: store.put(key, b"x"),
        lambda: store.create(key, b"x"),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete([key]),
    ):
        with pytest.raises(InvalidName):
            refused()


def test_a_url_opens_the_same_store(store: ObjectStore) -> None:
    store.put("k", b"x")
    assert open_store(store.url).get("k") == b"x"


def test_write_check_leaves_nothing_behind(store: ObjectStore) -> None:
    write_check(store)
    assert keys(store) == []


def test_a_race_has_one_winner_where_create_only_is_atomic(atomic_store: ObjectStore) -> None:
    result = race_probe(atomic_store)
    assert (result.atomic, result.reason) == (True, "one winner of 16 in each of 8 races")
    assert keys(atomic_store) == []


def test_the_probe_refuses_a_store_that_ignores_create_only(rclone: S3Server) -> None:
    store = open_store(rclone.url_of("probed"))
    result = race_probe(store)
    assert not result.atomic
    assert "of 16 concurrent creates of one key succeeded" in result.reason
    # After a race it may list for minutes what is deleted, and what nobody can read.
    assert [key for key in keys(store) if store.head(key) is not None] == []


def test_the_probe_refuses_a_store_that_is_atomic_only_in_sequence(swift: S3Server) -> None:
    store = open_store(swift.url_of("probed"))
    assert (store.create("k", b"1"), store.create("k", b"2"), store.get("k")) == (True, False, b"1")
    store.delete(["k"])
    result = race_probe(store)
    assert not result.atomic
    assert "of 16 concurrent creates of one key succeeded" in result.reason
    assert keys(store) == []


def test_looking_before_writing_is_no_create_only(rclone: S3Server) -> None:
    store = open_store(rclone.url_of("probed-too"), check_then_put=True)
    assert (store.create("k", b"1"), store.create("k", b"2")) == (True, False)
    assert not race_probe(store).atomic


@pytest.mark.parametrize("kind", ["radosgw", "rclone"])
def test_a_probe_is_remembered_and_not_made_again(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("storage.s3.place._on_this_machine", lambda host: False)
    with FaultProxy(server.endpoint) as proxy:
        url = server.url_of("remembered").replace(server.endpoint, proxy.endpoint)
        _, first = open_probed(url)
        sent = len(proxy.requests)
        store, second = open_probed(url)
        assert (sent > 0, len(proxy.requests)) == (True, sent), "the second sent nothing"
        assert isinstance(store, S3Store)
        assert store.check_then_put is (kind == "rclone")
        assert (first.atomic, first.reason, first.age_s) == (second.atomic, second.reason, None)
        assert second.age_s is not None
        assert second.when == "; probed 0 min ago"
        _, anew = open_probed(url.replace(proxy.endpoint, server.endpoint))
        assert anew.age_s is None, "another endpoint"
    everything = (tmp_path / "orchestrate" / "probes.json").read_text()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert server.environment[name] not in everything


@pytest.mark.parametrize("kind", ["rclone_tls", "radosgw_tls"])
def test_over_tls_the_checksums_of_boto3s_default_fail_and_our_settings_pass(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server: S3Server = request.getfixturevalue(kind)
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=server.bucket, Key="trailer", Body=b"x" * 1000)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 411

    store = open_store(server.url_of("no-trailer"))
    store.put("k", b"x" * 1000)
    assert store.get("k") == b"x" * 1000


def test_wrong_credentials_are_denied_and_not_repeated(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-0001")
    store = open_store(s3_server.url)
    with pytest.raises(AccessDenied, match=r"cannot write to the store: probe/.*403") as denied:
        write_check(store)
    assert "wrong-secret" not in str(denied.value)


def test_missing_credentials_say_where_they_are_looked_for(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessDenied, match="Set AWS_ACCESS_KEY_ID"):
        open_store(s3_server.url).get("k")


def test_a_missing_bucket_is_not_an_empty_store(s3_server: S3Server) -> None:
    store = open_store(f"s3://no-such-bucket?endpoint={s3_server.endpoint}")
    with pytest.raises(AccessDenied, match="create the bucket first"):
        keys(store)
    with pytest.raises(AccessDenied, match="create the bucket first"):
        store.get("k")


def test_a_server_that_does_not_answer_is_unavailable(rclone: S3Server) -> None:
    store = open_store(f"s3://loras?endpoint=http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(Unavailable, match="EndpointConnectionError"):
        store.create("k", b"x")
