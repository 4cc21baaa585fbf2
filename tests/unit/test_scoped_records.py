"""What a node may have written to the log, decided on values."""

from dataclasses import replace

import pytest
from support.granting import data_key
from support.runs import committed, ref
from support.scoped import DIGEST, LIMITS, ME, STATE, mine, write

from storage.errors import AccessDenied, Fenced, InvalidName, Unavailable
from storage.packing import codec_of
from storage.records import MAX_RECORD_BYTES, Committed, Packed, Quarantined, StoredFile
from storage.run_state import apply
from storage.scoped.grants import (
    MAX_FILES,
    MAX_LISTED,
    MAX_METRIC_CHARACTERS,
    MAX_METRICS,
    MAX_REQUEST_BYTES,
    SALVAGES,
    Append,
    Request,
    check_read,
    check_record,
    check_write,
)


def files_of(*sizes: int, packed_as: str | None = None) -> tuple[StoredFile, ...]:
    packed = Packed(codec=packed_as, size_bytes=9, sha256=DIGEST) if packed_as else None
    names = (f"{n:04d}".ljust(200, "x") for n in range(len(sizes)))
    return tuple(
        StoredFile(name=name, size_bytes=size, sha256=DIGEST, packed=packed)
        for name, size in zip(names, sizes, strict=True)
    )


def saying(**changes: object) -> Committed:
    return committed(30, 2).model_copy(update=changes)


def metrics_of(count: int, characters: int = 10) -> dict[str, float]:
    return {f"{n:04d}".ljust(characters, "m"): 0.5 for n in range(count)}


@pytest.mark.parametrize(
    "record",
    [
        saying(metrics=metrics_of(MAX_METRICS, 100)),
        saying(files=files_of(*[1] * MAX_FILES, packed_as="shuffle4.zstd"), metrics=metrics_of(20)),
        saying(files=files_of(400, 600)),
        *(saying(files=files_of(1, packed_as=codec_of(width))) for width in (1, 2, 4, 8)),
    ],
    ids=lambda record: f"{len(record.files)} files, {len(record.metrics)} metrics",
)
def test_a_commit_may_say_much(record: Committed) -> None:
    check_record(STATE, ME, record, LIMITS)
    assert len(Request(caller=ME, asked=Append(record=record)).model_dump_json()) < MAX_REQUEST_BYTES


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (saying(metrics=metrics_of(MAX_METRICS + 1)), "log fewer"),
        (saying(metrics={"m" * (MAX_METRIC_CHARACTERS + 1): 0.5}), "log fewer"),
        (saying(metrics={"m" * MAX_RECORD_BYTES: 0.5}), "'committed' takes"),
        (saying(files=files_of(*[0] * (MAX_FILES + 1))), "1001 files"),
        (saying(files=files_of(400, 601)), r"Raise storage\.max_checkpoint_bytes"),
        (saying(files=files_of(10**15, packed_as="zstd")), r"Raise storage\.max_checkpoint_bytes"),
        (saying(files=files_of(10, packed_as="shuffle3.zstd")), "cannot unpack"),
    ],
    ids=["metrics", "a metric's name", "bytes", "files", "size", "unpacked size", "codec"],
)
def test_a_commit_that_says_too_much_is_refused(record: Committed, why: str) -> None:
    with pytest.raises(InvalidName, match=why):
        check_record(STATE, ME, record, LIMITS)


def test_of_one_run_so_much_is_remembered_at_once() -> None:
    each = MAX_FILES + MAX_METRICS
    record = saying(files=files_of(*[0] * MAX_FILES), metrics=metrics_of(MAX_METRICS))
    full = tuple(record.model_copy(update={"step": n}) for n in range(30, 30 + MAX_LISTED // each))
    for state in (replace(STATE, checkpoints=full), replace(STATE, checkpoints=(), retired=full)):
        check_record(state, ME, full[0], LIMITS)  # said again, its reply was lost
        with pytest.raises(Unavailable, match="keep fewer"):
            check_record(state, ME, record.model_copy(update={"step": 999}), replace(LIMITS, last_step=None))


def test_an_attempt_makes_a_few_salvages() -> None:
    salvages = [
        committed(step, 2).model_copy(update={"resumable": False}) for step in range(30, 31 + SALVAGES)
    ]
    state = replace(STATE, salvaged=tuple(salvages[:-1]))
    check_record(state, ME, salvages[0], LIMITS)
    check_record(state, ME, committed(50, 2), LIMITS)
    with pytest.raises(AccessDenied, match="salvages"):
        check_record(state, ME, salvages[-1], LIMITS)
    older = tuple(c.model_copy(update={"attempt": 1}) for c in salvages[:-1])
    check_record(replace(STATE, salvaged=older), ME, salvages[-1], LIMITS)


def refusing(step: int, attempt: int = 1) -> Quarantined:
    return Quarantined(checkpoint=ref(step, attempt), attempt=2, reason="sha256", at=1.0)


def test_an_attempt_gives_up_no_checkpoint_but_the_one_that_it_resumes_from() -> None:
    check_record(STATE, ME, refusing(20), LIMITS)
    given_up = apply(STATE, refusing(20))
    check_record(given_up, ME, refusing(20), LIMITS)  # its reply was lost
    pinned = replace(STATE, pinned=(ref(20),))
    check_record(pinned, ME, refusing(20), LIMITS)
    gone_on = apply(STATE, committed(30, 2))
    for state, record in (
        (STATE, refusing(10)),
        (given_up, refusing(30)),
        (gone_on, refusing(20)),
        (gone_on, refusing(30, 2)),
    ):
        with pytest.raises(Fenced):
            check_record(state, ME, record, LIMITS)


def test_what_is_quarantined_stays_as_it_is() -> None:
    state = replace(apply(STATE, committed(30, 2)), quarantined=((ref(40, 2), "sha256"),))
    check_write(state, ME, write(mine(50)), LIMITS)
    with pytest.raises(AccessDenied, match="quarantined"):
        check_write(state, ME, write(mine(40)), LIMITS)


def test_an_attempt_resumes_from_what_is_left_after_a_quarantine() -> None:
    earlier = replace(STATE, checkpoints=STATE.checkpoints[:1])
    check_read(earlier, ME, data_key(10), LIMITS)
    with pytest.raises(AccessDenied):
        check_read(earlier, ME, data_key(20), LIMITS)
