"""What the probe concludes from stores that fail in ways real servers do, and how long that is believed."""

import itertools
import os
from pathlib import Path

import pytest
from support.flaky_store import Fault, FlakyStore

from storage.errors import AccessDenied, NotFound, Unavailable
from storage.memory import MemoryStore
from storage.probe import ProbeResult, race_probe, write_check
from storage.probe_memory import (
    DAY_S,
    Remembered,
    cache_file,
    recall,
    remember,
)
from storage.s3.place import identity

ENDPOINT = "https://store.example"


def test_a_store_with_one_winner_is_atomic_and_left_clean() -> None:
    store = MemoryStore()
    assert race_probe(store, rounds=2, writers=3) == ProbeResult(True, "one winner of 3 in each of 2 races")
    assert list(store.list("")) == []


def test_a_store_that_acknowledges_a_loser_is_refused() -> None:
    class Forgetful(MemoryStore):
        """One winner in a race, but a refused create leaves its own body."""

        def create(self, key: str, body: bytes) -> bool:
            won = super().create(key, body)
            self.put(key, body)
            return won

    result = race_probe(Forgetful(), writers=1)
    assert result == ProbeResult(False, "a refused create replaced the object (round 1 of 8)")


def test_a_store_that_refuses_everybody_is_refused() -> None:
    class Stubborn(MemoryStore):
        def create(self, key: str, body: bytes) -> bool:
            super().create(key, body)
            return False

    result = race_probe(Stubborn(), writers=3)
    assert result.reason == "none of 3 concurrent creates of one key succeeded (round 1 of 8)"


class Breaking(MemoryStore):
    """Lets ``winners`` creates win, and breaks at the others."""

    def __init__(self, winners: int) -> None:
        super().__init__()
        self._calls = itertools.count()
        self._winners = winners

    def create(self, key: str, body: bytes) -> bool:
        if next(self._calls) < self._winners:
            self.put(key, body)
            return True
        raise Unavailable("500 InternalError")


def test_two_winners_are_proof_even_if_others_got_errors() -> None:
    store = Breaking(winners=2)
    result = race_probe(store, writers=4)
    assert result == ProbeResult(False, "2 of 4 concurrent creates of one key succeeded (round 1 of 8)")
    assert list(store.list("")) == []


def test_errors_alone_prove_nothing() -> None:
    store = Breaking(winners=1)
    with pytest.raises(Unavailable, match="500 InternalError"):
        race_probe(store, writers=4)
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("call", "step"), [(1, "write to"), (2, "read from"), (3, "list"), (4, "delete from"), (5, "delete from")]
)
def test_a_check_that_fails_says_at_which_step(call: int, step: str) -> None:
    with pytest.raises(Unavailable, match=f"cannot {step} the store: the store did not answer"):
        write_check(FlakyStore(MemoryStore(), at=call, fault=Fault.REFUSE))


def test_a_listing_that_lags_behind_is_noticed() -> None:
    class Lagging(MemoryStore):
        def list(self, prefix: str, after: str = ""):  # type: ignore[no-untyped-def]
            return iter(())

    with pytest.raises(NotFound, match=r"cannot list the store: .* a listing does not show it"):
        write_check(Lagging())


def test_credentials_that_may_not_delete_are_noticed() -> None:
    class NoDelete(MemoryStore):
        def delete(self, keys) -> None:  # type: ignore[no-untyped-def]
            raise AccessDenied("403")

    with pytest.raises(AccessDenied, match="cannot delete from the store: 403"):
        write_check(NoDelete())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE00")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-is-nowhere-written")
    return cache_file()


def found(at: float = 1000.0, *, atomic: bool = True) -> Remembered:
    return Remembered(atomic=atomic, reason="seen", at=at)


def test_an_answer_is_remembered_for_a_day_and_for_our_eyes_only(cache: Path) -> None:
    remember("place", found())

    assert recall("place", 1000.0 + DAY_S - 1) == found()
    assert recall("place", 1000.0 + DAY_S) is None
    assert recall("place", 999.0) is None, "it comes from the future"
    assert recall("another place", 1000.0) is None
    assert os.stat(cache).st_mode & 0o777 == 0o600
    assert list(cache.parent.iterdir()) == [cache]


def test_a_newer_answer_replaces_the_older_and_the_oldest_go(cache: Path) -> None:
    remember("old", found(at=0.0))
    remember("a", found(at=DAY_S))
    remember("a", found(at=DAY_S + 5, atomic=False))

    assert recall("a", DAY_S + 5) == found(at=DAY_S + 5, atomic=False)
    assert '"old"' not in cache.read_text()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"schema":2,"probes":{}}',
        b'{"schema":1,"probes":{"place":{"atomic":1,"reason":"","at":1000}}}',
    ],
)
def test_a_damaged_file_says_nothing_and_is_replaced(cache: Path, damaged: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damaged)
    assert recall("place", 1000.0) is None
    remember("place", found())
    assert recall("place", 1000.0) == found()


def test_a_cache_that_cannot_be_written_costs_a_probe_and_no_more(cache: Path) -> None:
    cache.parent.parent.write_bytes(b"a file where the folder should be")
    remember("place", found())
    assert recall("place", 1000.0) is None


def test_an_answer_holds_for_one_endpoint_one_bucket_and_one_user(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = identity(f"s3://loras/a?endpoint={ENDPOINT}")
    assert mine == identity(f"s3://loras/b?endpoint={ENDPOINT}"), "a bucket is of one kind"

    others = [
        identity(f"s3://loras2/a?endpoint={ENDPOINT}"),
        identity(f"s3://loras/a?endpoint={ENDPOINT}:8443"),
        identity("s3://loras/a?endpoint=http://store.example"),
        identity("s3://loras/a"),
    ]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://elsewhere.example")
    others.append(identity("s3://loras/a"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE01")
    others.append(identity(f"s3://loras/a?endpoint={ENDPOINT}"))
    assert None not in others
    assert len({mine, *others}) == 7


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:9000", "[::1]:9000", "127.1.2.3"])
def test_a_server_on_this_machine_is_never_remembered(cache: Path, host: str) -> None:
    assert identity(f"s3://loras?endpoint=http://{host}") is None


def test_without_credentials_or_a_bucket_nothing_is_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert identity(f"s3://loras?endpoint={ENDPOINT}") is None
    assert identity(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("age_s", "when"),
    [
        (None, ""),
        (5.0, "; probed 0 min ago"),
        (3 * 60.0, "; probed 3 min ago"),
        (3.5 * 3600, "; probed 3 h ago"),
    ],
)
def test_a_remembered_answer_says_how_old_it_is(age_s: float | None, when: str) -> None:
    assert ProbeResult(True, "x", age_s).when == when
