"""Values of a run's life, for tests that need a log or a checkpoint with as few words as possible."""

from collections.abc import Mapping
from pathlib import Path

from storage.local import LocalCheckpoint, read_checkpoint, staged_checkpoint, step_dir
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore
from storage.records import (
    CheckpointRef,
    Claimed,
    Committed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Record,
    Retired,
    StoredFile,
)
from storage.run_state import RunState, apply, refusal

RUN = "cat-r16"
NO_DIGEST = "0" * 64


def incarnation(attempt: int) -> str:
    return f"{attempt:08x}"


def claimed(attempt: int = 1, who: str | None = None, *, node: str = "n1") -> Claimed:
    return Claimed(
        attempt=attempt, incarnation=who or incarnation(attempt), node=node, slot=f"{node}/0", at=1.0
    )


def committed(
    step: int, attempt: int = 1, *, metrics: Mapping[str, float] | None = None, final: bool = False
) -> Committed:
    return Committed(
        attempt=attempt,
        incarnation=incarnation(attempt),
        step=step,
        files=(StoredFile(name="adapter.safetensors", size_bytes=0, sha256=NO_DIGEST),),
        metrics=dict(metrics or {}),
        final=final,
        at=2.0,
    )


def ended(attempt: int = 1, reason: EndReason = EndReason.NODE_LOST) -> Ended:
    return Ended(attempt=attempt, reason=reason, at=3.0)


def retired(*refs: CheckpointRef) -> Retired:
    return Retired(checkpoints=refs, at=4.0)


def finished(outcome: Outcome = Outcome.SUCCEEDED) -> Finished:
    return Finished(outcome=outcome, at=5.0)


def ref(step: int, attempt: int = 1) -> CheckpointRef:
    return CheckpointRef(step=step, attempt=attempt)


def state_after(*records: Record) -> RunState:
    """What a log of these records says, all of them admitted."""
    state = RunState()
    for record in records:
        assert refusal(state, record) is None, f"the history is impossible: {refusal(state, record)}"
        state = apply(state, record)
    return state


def lived(store: ObjectStore, run_id: str, *history: Record) -> RunLog:
    """Append these records to the log of a run."""
    log = run_log(store, run_id)
    for record in history:
        log.append(record)
    return log


def contents(step: int) -> dict[str, bytes]:
    """The files of the test checkpoint of a step."""
    return {
        "adapter.safetensors": b"weights %d " % step * 50,
        "state/optimizer.safetensors": b"moments %d " % step * 100,
    }


def write_checkpoint(
    root: Path, step: int, *, final: bool = False, files: Mapping[str, bytes] | None = None
) -> LocalCheckpoint:
    """Write a complete checkpoint the way a trainer does."""
    with staged_checkpoint(root, step, metrics={"loss": 1 / (1 + step)}, final=final) as directory:
        for name, body in (contents(step) if files is None else files).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(body)
    local = read_checkpoint(root / step_dir(step))
    assert local is not None
    return local


def read_files(directory: Path) -> dict[str, bytes]:
    """Every file of a checkpoint directory but its manifest."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
