"""What the probe concludes from stores that fail in ways real servers do."""

import itertools

import pytest
from support.flaky_store import Fault, FlakyStore

from storage.errors import AccessDenied, NotFound, Unavailable
from storage.memory import MemoryStore
from storage.probe import ProbeResult, race_probe, write_check


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
    assert result == ProbeResult(False, "a refused create replaced the object (round 1 of 4)")


def test_a_store_that_refuses_everybody_is_refused() -> None:
    class Stubborn(MemoryStore):
        def create(self, key: str, body: bytes) -> bool:
            super().create(key, body)
            return False

    result = race_probe(Stubborn(), writers=3)
    assert result.reason == "none of 3 concurrent creates of one key succeeded (round 1 of 4)"


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
    assert result == ProbeResult(False, "2 of 4 concurrent creates of one key succeeded (round 1 of 4)")
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
