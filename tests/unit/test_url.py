"""Store urls: what each form opens, and what is refused before anything is read or written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.directory import DirectoryStore
from storage.errors import AccessDenied, InvalidName, NotFound
from storage.s3.store import S3Store
from storage.url import open_store


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTACCESSKEY001")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey0001")


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE://{}"])
def test_a_folder_opens_by_path_or_file_url(tmp_path: Path, form: str) -> None:
    store = open_store(form.format(tmp_path / "bucket"))
    assert isinstance(store, DirectoryStore)
    assert store.root == tmp_path / "bucket"
    assert not store.root.exists(), "opening writes nothing"


@pytest.mark.parametrize("relative", ["bucket", "./bucket", "file://./bucket", "file://../x/bucket"])
def test_a_relative_folder_is_pinned_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: str
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    store = open_store(relative)
    store.put("k", b"x")
    monkeypatch.chdir("/")
    assert open_store(store.url).get("k") == b"x"
    assert (tmp_path / "x" / "bucket" / "k").read_bytes() == b"x"


def test_a_folder_with_awkward_characters_survives_its_url(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "my loras #1 100%?"))
    store.put("k", b"x")
    assert open_store(store.url).get("k") == b"x"


def test_memory_stores_are_one_per_name() -> None:
    open_store("memory://shared").put("k", b"x")
    assert open_store("memory://shared").get("k") == b"x"
    with pytest.raises(NotFound):
        open_store("memory://other").get("k")


def test_a_bucket_url_is_read_whole_and_shown_without_secrets() -> None:
    url = "s3://my-loras/team/a?endpoint=http://127.0.0.1:9000&region=eu-west-1"
    store = open_store(url)
    assert isinstance(store, S3Store)
    assert store.url == url
    assert open_store(store.url).url == url
    assert not store.check_then_put
    arbitrated = open_store("s3://my-loras", check_then_put=True)
    assert isinstance(arbitrated, S3Store)
    assert arbitrated.check_then_put


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "store url is empty"),
        ("  ", "store url is empty"),
        ("gs://bucket", "scheme 'gs': use a path, file:///path, s3://"),
        ("https://s3.example.com/bucket", "scheme 'https'"),
        ("file://host/share", "a file url has three slashes"),
        ("file://", "a file url has three slashes"),
        ("memory://", "memory store name"),
        ("memory://Upper", "memory store name"),
        ("s3://", "bucket '' is not"),
        ("s3://ab", "bucket 'ab' is not 3 to 63"),
        ("s3://My_Bucket", "bucket 'My_Bucket' is not"),
        ("s3://bucket/a//b", "leading, trailing or double"),
        ("s3://bucket/../other", "'.' and '..' are not allowed"),
        ("s3://bucket?endpoint=host:9000", "the endpoint is not a url"),
        ("s3://bucket?endpoint=ftp://host", "the endpoint is not a url"),
        ("s3://bucket?endpoint=http://host:port", "the endpoint is not a url"),
        ("s3://bucket?endpoint=", "the endpoint is not a url"),
        ("s3://bucket?region=Moon!", "is not a region"),
        ("s3://bucket?region=", "is not a region"),
        ("s3://bucket?regoin=eu-west-1", "not 'regoin'"),
        ("s3://bucket?region=a&region=b", "each once"),
        ("s3://bucket#x", "may follow"),
    ],
)
def test_a_url_that_means_nothing_is_refused_with_what_would(url: str, reason: str) -> None:
    with pytest.raises(InvalidName) as refused:
        open_store(url)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:topsecret@bucket/prefix",
        "s3://bucket?endpoint=https://user:topsecret@host:9000",
        "s3://bucket?endpoint=https://host:9000/?token=topsecret",
        "s3://bucket?aws_secret_access_key=topsecret",
        "s3://bucket?secret=topsecret#topsecret",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidName) as refused:
        open_store(url)
    assert "topsecret" not in str(refused.value)
    assert "AKIAEXAMPLE" not in str(refused.value)


def test_a_folder_needs_no_boto3() -> None:
    code = (
        "import sys; from storage.url import open_store; import storage.checkpoints, storage.log;"
        "open_store('./x'); open_store('memory://x');"
        "sys.exit(bool({'boto3', 'botocore', 'watchdog', 'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_symlink_in_a_folder_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    store = open_store(str(tmp_path / "bucket"))
    store.put("a/k", b"x")
    (tmp_path / "bucket" / "link").symlink_to(outside)
    (tmp_path / "bucket" / "a" / "file").symlink_to(outside / "secret")

    for escape in (
        lambda: store.put("link/new", b"x"),
        lambda: store.put("link/deep/new", b"x"),
        lambda: store.create("link/new", b"x"),
        lambda: store.get("link/secret"),
        lambda: store.get("a/file"),
        lambda: store.delete(["link/secret"]),
        lambda: list(store.list("link/")),
    ):
        with pytest.raises(InvalidName):
            escape()
    assert [info.key for info in store.list("")] == ["a/k"]
    assert sorted(os.listdir(outside)) == ["secret"]


def test_the_root_of_a_folder_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "loras").symlink_to(tmp_path / "disk")
    store = open_store(str(tmp_path / "loras"))
    store.put("a/k", b"x")
    assert [info.key for info in store.list("")] == ["a/k"]
    assert (tmp_path / "disk" / "a" / "k").read_bytes() == b"x"


def test_unfinished_files_of_a_folder_are_hidden_and_out_of_reach(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("k", b"x")
    (tmp_path / ".tmp" / "torn").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["k"]
    with pytest.raises(InvalidName, match=r"where .* keeps unfinished files"):
        store.get(".tmp/torn")


def test_an_emptied_folder_leaves_no_directories_behind(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "bucket"))
    store.put("runs/a/data/x", b"x")
    store.put("runs/b", b"x")
    store.delete(["runs/a/data/x"])
    assert sorted(p.name for p in (tmp_path / "bucket" / "runs").iterdir()) == ["b"]


def test_a_folder_that_is_a_file_or_read_only_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((InvalidName, AccessDenied), match="file"):
        open_store(str(tmp_path / "file")).put("k", b"x")
    with pytest.raises(AccessDenied, match="must be writable"):
        open_store("/sys/loras").put("k", b"x")
