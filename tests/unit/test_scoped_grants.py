"""What may be granted to a node, decided on values."""

import pytest
from support.granting import caller_of, data_key
from support.runs import RUN, claimed, committed, ended, incarnation, state_after
from support.scoped import DIGEST, LIMITS, MD5, ME, STATE, mine, write

from storage import layout
from storage.errors import AccessDenied, Fenced, InvalidName, StorageError, Unavailable
from storage.run_state import RunState
from storage.scoped.grants import (
    MAX_FILES,
    MIN_PART_BYTES,
    UNCOMMITTED_CHECKPOINTS,
    Given,
    Limits,
    Write,
    abandoned,
    check_caller,
    check_quota,
    check_read,
    check_write,
    replaceable,
)

LARGE = Limits(last_step=100)


def given(*sizes: tuple[str, int], until: float = 900.0) -> dict[str, Given]:
    return {key: Given(write=write(key, size), until=until) for key, size in sizes}


def test_the_running_attempt_on_its_slot_is_heard() -> None:
    check_caller(STATE, ME)


@pytest.mark.parametrize(
    "caller",
    [
        caller_of(1),
        caller_of(3),
        caller_of(2, slot="n2/0"),
        ME.model_copy(update={"incarnation": incarnation(1)}),
        ME.model_copy(update={"attempt": 1}),
    ],
    ids=["ghost", "future", "another slot", "another incarnation", "another attempt"],
)
def test_nobody_else_is(caller: object) -> None:
    with pytest.raises(Fenced):
        check_caller(STATE, caller)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [RunState(), state_after(claimed(1)), state_after(claimed(1), ended(1))])
def test_no_attempt_that_is_not_running_is_heard(state: RunState) -> None:
    with pytest.raises(Fenced):
        check_caller(state, ME)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        (layout.run_spec(RUN), True),
        (data_key(20), True),
        (data_key(10), False),
        (data_key(20, "unnamed"), False),
        (layout.run_spec("dog"), False),
        (layout.sweep_spec("cats"), False),
        (layout.log_entry(layout.run_log_prefix(RUN), 0), False),
        (layout.events_key(RUN, 2, 0), False),
        (layout.content_listing(DIGEST, "00000001"), True),
        (layout.content_file(DIGEST, "00000001", "a" * 64), True),
        (layout.content_listing("e" * 64, "00000001"), False),
        (layout.log_entry(layout.content_log_prefix(DIGEST), 0), False),
        ("", False),
        ("runs/../sweeps/cats/spec.json", False),
    ],
)
def test_what_may_be_read(key: str, allowed: bool) -> None:
    if allowed:
        check_read(STATE, ME, key, LIMITS)
    else:
        with pytest.raises(AccessDenied):
            check_read(STATE, ME, key, LIMITS)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (mine(30), None),
        (mine(20), None),
        (mine(10), AccessDenied),
        (mine(101), AccessDenied),
        (data_key(30, attempt=1), AccessDenied),
        (data_key(30, attempt=3), AccessDenied),
        (mine(30).replace(incarnation(2), incarnation(1)), AccessDenied),
        (mine(30).replace(RUN, "dog"), AccessDenied),
        (layout.events_key(RUN, 2, 0), None),
        (layout.log_text_key(RUN, 2, 7), None),
        (layout.events_key(RUN, 1, 0), AccessDenied),
        (layout.events_key("dog", 2, 0), AccessDenied),
        (layout.sample_key(RUN, 30, "a.png"), None),
        (layout.sample_key(RUN, 101, "a.png"), AccessDenied),
        (layout.sample_key("dog", 30, "a.png"), AccessDenied),
        (layout.run_spec(RUN), AccessDenied),
        (layout.log_entry(layout.run_log_prefix(RUN), 9), AccessDenied),
        (layout.content_listing(DIGEST, "00000001"), AccessDenied),
        ("anything", AccessDenied),
        (mine(30) + "/../../escape", InvalidName),
        (mine(30) + "\0", InvalidName),
        (mine(30) + "x" * 900, InvalidName),
    ],
)
def test_what_may_be_written(key: str, error: type[StorageError] | None) -> None:
    if error is None:
        check_write(STATE, ME, write(key), LIMITS)
    else:
        with pytest.raises(error):
            check_write(STATE, ME, write(key), LIMITS)


def test_no_file_is_larger_than_its_kind_may_be() -> None:
    check_write(STATE, ME, write(mine(30), 1000), LIMITS)
    with pytest.raises(InvalidName, match=r"raise storage\.max_checkpoint_bytes"):
        check_write(STATE, ME, write(mine(30), 1001), LIMITS)
    for key in (layout.events_key(RUN, 2, 0), layout.sample_key(RUN, 30, "a.png")):
        with pytest.raises(InvalidName):
            check_write(STATE, ME, write(key, 10**9), LIMITS)


@pytest.mark.parametrize(
    ("size", "part", "count"),
    [
        (2 * MIN_PART_BYTES + 1, MIN_PART_BYTES, 2),
        (2 * MIN_PART_BYTES, MIN_PART_BYTES, 3),
        (0, MIN_PART_BYTES, 1),
        (10, 0, 1),
        (10, MIN_PART_BYTES, 0),
        (10, 1, 10),
        (MIN_PART_BYTES, MIN_PART_BYTES - 1, 2),
    ],
)
def test_parts_that_do_not_add_up_or_are_too_small_are_refused(size: int, part: int, count: int) -> None:
    asked = Write(key=mine(30), size_bytes=size, md5=MD5, part_bytes=part, parts=(MD5,) * count)
    with pytest.raises(InvalidName, match="parts of"):
        check_write(STATE, ME, asked, LARGE)


def test_the_last_part_is_what_is_left() -> None:
    part = MIN_PART_BYTES
    asked = Write(key=mine(30), size_bytes=2 * part + 1, md5=MD5, part_bytes=part, parts=(MD5,) * 3)
    check_write(STATE, ME, asked, LARGE)
    assert [asked.part_size(number) for number in (1, 2, 3)] == [part, part, 1]


def test_a_node_cannot_fill_the_bucket() -> None:
    whole = [(mine(step), 1000) for step in range(30, 30 + UNCOMMITTED_CHECKPOINTS)]
    check_quota(STATE, write(whole[-1][0], 1000), given(*whole), LIMITS)  # asked again: it counts once
    with pytest.raises(AccessDenied, match="a checkpoint may have"):
        check_quota(STATE, write(mine(30, "more"), 1), given(*whole), LIMITS)
    with pytest.raises(Unavailable, match="under way"):
        check_quota(STATE, write(mine(40), 1), given(*whole), LIMITS)
    batches = given((layout.events_key(RUN, 2, 0), 995))
    with pytest.raises(AccessDenied, match="events, logs and samples"):
        check_quota(STATE, write(layout.sample_key(RUN, 30, "a.png")), batches, LIMITS)
    crowd = given(*((mine(30, str(n)), 0) for n in range(MAX_FILES)))
    with pytest.raises(AccessDenied, match="files"):
        check_quota(STATE, write(mine(30, "one more"), 0), crowd, LIMITS)


def test_only_what_no_signature_reaches_makes_room() -> None:
    held = given((mine(30), 1000)) | given((mine(40), 1000), until=2000.0)
    held |= given((layout.events_key(RUN, 2, 0), 5))
    assert abandoned(held, 50, now=899.0) == []
    assert abandoned(held, 50, now=901.0) == [mine(30)]
    assert abandoned(held, 30, now=9999.0) == []


def test_what_a_record_names_is_never_replaced() -> None:
    state = state_after(claimed(1), committed(10), committed(20))
    me = caller_of(1)
    assert not replaceable(state, me, data_key(20))
    assert replaceable(state, me, data_key(30))
    assert replaceable(state, me, layout.events_key(RUN, 1, 0))
    resumed = STATE
    assert not replaceable(resumed, ME, layout.sample_key(RUN, 20, "a.png"))
    assert replaceable(resumed, ME, layout.sample_key(RUN, 30, "a.png"))
