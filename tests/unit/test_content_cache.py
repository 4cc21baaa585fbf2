"""A node's content cache: one fetch for all, nothing in use is deleted, and a killed fetch leaves no half."""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.content.cache import ContentCache
from storage.content.state import Listing, listing_digest
from storage.errors import Unavailable
from storage.records import StoredFile

DEADLINE_S = 60.0


def listing(content: dict[str, bytes], root: str = "") -> Listing:
    files = (
        StoredFile(name=name, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
        for name, body in content.items()
    )
    return Listing(root=root, files=tuple(files))


def of(name: str, size: int = 1000) -> dict[str, bytes]:
    return {f"{name}.png": name.encode() * (size // len(name))}


class Source:
    """Says how often each content was fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.before: Callable[[Path], None] = lambda target: None

    def __call__(self, content: dict[str, bytes], root: str = "") -> Callable[[Path], Listing]:
        def fetch(target: Path) -> Listing:
            self.before(target)
            self.fetched.append(next(iter(content)))
            for name, body in content.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(body)
            return listing(content, root)

        return fetch


@pytest.fixture
def source() -> Source:
    return Source()


def hold(
    cache: ContentCache, source: Source, content: dict[str, bytes], root: str = ""
) -> contextlib.AbstractContextManager[Path]:
    size = sum(map(len, content.values()))
    return cache.hold(listing_digest(listing(content, root)), size, source(content, root), lambda s: False)


def test_a_content_is_fetched_once(tmp_path: Path, source: Source) -> None:
    for _ in range(2):
        with hold(ContentCache(tmp_path), source, of("cat")) as place:
            assert (place / "cat.png").read_bytes() == of("cat")["cat.png"]
    assert source.fetched == ["cat.png"]


def test_a_single_file_is_the_place_itself(tmp_path: Path, source: Source) -> None:
    content = {"sd.safetensors": b"weights", "sd/model_index.json": b"{}"}
    with hold(ContentCache(tmp_path), source, content, "sd.safetensors") as place:
        assert place.read_bytes() == b"weights"
        assert (place.with_suffix("") / "model_index.json").read_bytes() == b"{}"


def test_many_that_want_it_at_once_share_one_fetch(tmp_path: Path, source: Source) -> None:
    at_once = threading.Barrier(4)
    seen = []

    def want() -> None:
        at_once.wait(DEADLINE_S)
        with hold(ContentCache(tmp_path), source, of("cat")) as place:
            seen.append((place / "cat.png").read_bytes())

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert seen == [of("cat")["cat.png"]] * 4
    assert source.fetched == ["cat.png"]


def test_what_the_user_of_a_content_raises_is_not_the_caches(tmp_path: Path, source: Source) -> None:
    error = FileNotFoundError(2, "no such config", "config.yaml")
    with pytest.raises(FileNotFoundError) as raised, hold(ContentCache(tmp_path), source, of("cat")):
        raise error
    assert raised.value is error


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, source: Source) -> None:
    cache = ContentCache(tmp_path, limit_bytes=2500)
    for age, name in enumerate(("cat", "dog")):
        with hold(cache, source, of(name)):
            pass
        meta = tmp_path / listing_digest(listing(of(name))) / "meta.json"
        os.utime(meta, (1000 + age, 1000 + age))
    with hold(cache, source, of("cat")):  # now the dog is older
        pass
    with hold(cache, source, of("eel")):
        pass
    with hold(cache, source, of("cat")):
        pass
    assert source.fetched == ["cat.png", "dog.png", "eel.png"]
    assert not (tmp_path / listing_digest(listing(of("dog")))).exists()


def test_what_an_attempt_uses_is_never_deleted(tmp_path: Path, source: Source) -> None:
    cache = ContentCache(tmp_path, limit_bytes=10)
    with hold(cache, source, of("cat")) as cat, hold(cache, source, of("dog")) as dog:
        assert (cat / "cat.png").exists()
        assert (dog / "dog.png").exists()
    with hold(cache, source, of("eel")):
        assert not cat.exists()
        assert not dog.exists()


def test_a_fetch_that_fails_is_continued_and_never_seen(tmp_path: Path, source: Source) -> None:
    def fail(target: Path) -> None:
        (target / "early.png").write_bytes(b"arrived")
        raise Unavailable("the store went away")

    source.before = fail
    with pytest.raises(Unavailable, match="went away"), hold(ContentCache(tmp_path), source, of("cat")):
        pass
    found = []
    source.before = lambda target: found.extend(path.name for path in target.iterdir())

    with hold(ContentCache(tmp_path), source, of("cat")):
        assert found == ["early.png"]


def _fetch_and_hang(folder: Path, started: "multiprocessing.synchronize.Event") -> None:
    def fetch(target: Path) -> Listing:
        (target / "early.png").write_bytes(b"arrived")
        started.set()
        signal.pause()
        raise AssertionError("unreachable")

    digest = listing_digest(listing(of("cat")))
    with ContentCache(folder).hold(digest, 1000, fetch, lambda seconds: False):
        pass


def test_a_killed_fetch_blocks_nobody(tmp_path: Path, source: Source) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_fetch_and_hang, args=(tmp_path, started))
    process.start()
    assert started.wait(DEADLINE_S)
    process.kill()
    process.join(DEADLINE_S)

    with hold(ContentCache(tmp_path), source, of("cat")) as place:
        assert (place / "cat.png").exists()


def test_who_waits_for_another_fetch_can_be_stopped(tmp_path: Path, source: Source) -> None:
    fetching, go_on = threading.Event(), threading.Event()
    source.before = lambda target: (fetching.set(), go_on.wait(DEADLINE_S))  # type: ignore[func-returns-value]

    def first() -> None:
        with hold(ContentCache(tmp_path), source, of("cat")):
            pass

    thread = threading.Thread(target=first)
    thread.start()
    assert fetching.wait(DEADLINE_S)
    digest = listing_digest(listing(of("cat")))
    with (
        pytest.raises(Unavailable, match="being fetched; the attempt was asked to stop"),
        ContentCache(tmp_path).hold(digest, 1000, source(of("cat")), lambda seconds: True),
    ):
        pass
    go_on.set()
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("harm", ["cut", "gone", "meta"])
def test_a_damaged_copy_is_fetched_again(harm: str, tmp_path: Path, source: Source) -> None:
    with hold(ContentCache(tmp_path), source, of("cat")) as place:
        pass
    match harm:
        case "cut":
            (place / "cat.png").write_bytes(b"short")
        case "gone":
            (place / "cat.png").unlink()
        case "meta":
            (place.parent / "meta.json").write_text("{")

    with hold(ContentCache(tmp_path), source, of("cat")) as place:
        assert (place / "cat.png").read_bytes() == of("cat")["cat.png"]


def test_a_disk_without_room_says_so(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))

    with (
        pytest.raises(Unavailable, match=r"no space left: content .* GB more, the disk has 0\.0 GB"),
        hold(ContentCache(tmp_path), source, of("cat")),
    ):
        pass
    assert source.fetched == []


@pytest.mark.parametrize("digest", ["../evil", "", "A" * 64])
def test_only_a_digest_becomes_a_folder(digest: str, tmp_path: Path, source: Source) -> None:
    with (
        pytest.raises(Exception, match="expected 64 hexadecimal digits"),
        ContentCache(tmp_path).hold(digest, 1, source(of("cat")), lambda seconds: False),
    ):
        pass
