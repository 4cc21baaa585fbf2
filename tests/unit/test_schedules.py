"""Thousands of random histories hold what the protocol promises; of a protocol that is wrong, some do not.

``make schedules`` plays a hundred thousand.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from proof.schedules import Mutation, play

import storage.log
import storage.run_state
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.local import LocalCheckpoint
from storage.records import (
    CheckpointRef,
    Committed,
    Finished,
    Outcome,
    Record,
)
from storage.run_state import RunState

SCHEDULES = 3000
ENOUGH = 4000
"""A wrong protocol is found out within so many schedules."""


def found_out(mutation: Mutation | None = None, *, saying: str = "") -> bool:
    """Whether some seed has a violation, of those words."""
    verdicts = (play(seed, mutation) for seed in range(ENOUGH))
    return any(saying in line for verdict in verdicts for line in verdict.violations)


def test_random_histories_violate_nothing() -> None:
    failed = [verdict for seed in range(SCHEDULES) if (verdict := play(seed)).violations]

    assert not failed, f"make schedules N=1 SEED={failed[0].seed}: {failed[0].violations}"


def test_a_seed_is_one_history() -> None:
    def told(seed: int) -> list[str]:
        """What happened, without the random parts of the entries."""
        return [line.partition(" -> {")[0] for line in play(seed, record=True).history]

    for seed in range(200, 220):
        assert told(seed) == told(seed)


def test_a_store_whose_create_is_not_atomic_is_found_out() -> None:
    assert found_out(Mutation(torn_create=True))


def test_a_log_that_fences_nobody_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.run_state, "_refuse_attempt", lambda state, attempt: None)

    assert found_out(saying="the last claimed is")


def test_a_writer_that_does_not_know_its_own_record_again_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgets(state: RunState, record: Record) -> bool:
        return not isinstance(record, Committed) and storage.run_state.holds(state, record)

    monkeypatch.setattr(storage.log, "holds", forgets)

    assert found_out(saying="refused, and in the log")


class ReapsFirst(CheckpointStore):
    """Deletes the data, and says so afterwards."""

    def retire(self, refs: Iterable[CheckpointRef]) -> RunState | None:
        doomed = tuple(refs)
        state = self._ledger.refresh()
        self.delete(c for c in state.stored if c.ref in doomed)
        return super().retire(doomed)

    def delete(self, checkpoints: Iterable[Committed]) -> None:
        for c in checkpoints:
            prefix = layout.checkpoint_prefix(self._run_id, c.attempt, c.incarnation, c.step)
            self._store.delete([info.key for info in self._store.list(prefix)])


def test_deleting_before_retiring_is_found_out() -> None:
    assert found_out(Mutation(checkpoints=ReapsFirst), saying="not retired, and not there")


class SweepsTheLiving(CheckpointStore):
    """Takes the data of the newest attempt for orphaned."""

    def sweep_orphans(self, state: RunState) -> int:
        return super().sweep_orphans(replace(state, finished=Finished(outcome=Outcome.FAILED, at=0.0)))


def test_sweeping_what_the_newest_attempt_uploads_is_found_out() -> None:
    assert found_out(Mutation(checkpoints=SweepsTheLiving), saying="not retired, and not there")


class CommitsFirst(CheckpointStore):
    """Says that a checkpoint exists, and uploads it then."""

    def publish(self, local: LocalCheckpoint, attempt: int, incarnation: str) -> Committed:
        manifest = local.manifest
        committed = Committed(
            attempt=attempt,
            incarnation=incarnation,
            step=manifest.step,
            files=manifest.files,
            final=manifest.final,
            at=0.0,
        )
        self._ledger.append(committed)
        return super().publish(local, attempt, incarnation)


def test_committing_before_uploading_is_found_out() -> None:
    assert found_out(Mutation(checkpoints=CommitsFirst), saying="not retired, and not there")
