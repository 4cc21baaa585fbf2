"""What may be granted, decided on values; and what a node makes of the answers. No server takes part."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.granting import caller_of, data_key
from support.runs import RUN, claimed, committed, ended, incarnation, ref

from orchestrator.commands.session import refuse_unrunnable
from orchestrator.errors import InvalidFile, PreflightFailed
from orchestrator.grid.sweep import load
from orchestrator.launching.launch import start
from orchestrator.on_ray.agent import forget_credentials
from storage import layout
from storage.errors import (
    AccessDenied,
    Corrupt,
    Fenced,
    InvalidName,
    StorageError,
    Unavailable,
)
from storage.memory import MemoryStore
from storage.packing import codec_of
from storage.probe import ProbeResult
from storage.records import MAX_RECORD_BYTES, Committed, Packed, Quarantined, Record, StoredFile
from storage.run_state import RunState, apply, refusal
from storage.scoped.grants import (
    MAX_FILES,
    MAX_LISTED,
    MAX_METRIC_CHARACTERS,
    MAX_METRICS,
    MAX_REQUEST_BYTES,
    MIN_PART_BYTES,
    REPLY,
    REQUEST,
    SALVAGES,
    UNCOMMITTED_CHECKPOINTS,
    Append,
    Given,
    Granted,
    Limits,
    Read,
    Refused,
    Request,
    Told,
    Write,
    abandoned,
    check_caller,
    check_quota,
    check_read,
    check_record,
    check_write,
    refused,
    replaceable,
)
from storage.scoped.store import ScopedLedger, ScopedStore

MD5 = "0" * 32
DIGEST = "d" * 64
LIMITS = Limits(max_checkpoint_bytes=1000, last_step=100, inputs=frozenset({DIGEST}))
LARGE = Limits(last_step=100)
ME = caller_of(2)


def after(*records: Record) -> RunState:
    state = RunState()
    for record in records:
        assert refusal(state, record) is None
        state = apply(state, record)
    return state


STATE = after(claimed(1), committed(10), committed(20), ended(1), claimed(2))


def write(key: str, size: int = 10) -> Write:
    return Write(key=key, size_bytes=size, md5=MD5)


def given(*sizes: tuple[str, int], until: float = 900.0) -> dict[str, Given]:
    return {key: Given(write=write(key, size), until=until) for key, size in sizes}


def mine(step: int, name: str = "adapter.safetensors") -> str:
    return data_key(step, name, attempt=2)


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


@pytest.mark.parametrize("state", [RunState(), after(claimed(1)), after(claimed(1), ended(1))])
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
    state = after(claimed(1), committed(10), committed(20))
    me = caller_of(1)
    assert not replaceable(state, me, data_key(20))
    assert replaceable(state, me, data_key(30))
    assert replaceable(state, me, layout.events_key(RUN, 1, 0))
    resumed = STATE
    assert not replaceable(resumed, ME, layout.sample_key(RUN, 20, "a.png"))
    assert replaceable(resumed, ME, layout.sample_key(RUN, 30, "a.png"))


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


@pytest.mark.parametrize("kind", [AccessDenied, Corrupt, Fenced, InvalidName, Unavailable])
def test_a_refusal_arrives_as_the_error_that_it_was(kind: type[StorageError]) -> None:
    ledger = ScopedLedger(lambda body: REPLY.dump_json(refused(kind("why"))), ME)
    with pytest.raises(kind, match="why"):
        ledger.refresh()


def test_a_state_arrives_as_it_was() -> None:
    assert ScopedLedger(lambda body: REPLY.dump_json(Told(state=STATE)), ME).refresh() == STATE


@pytest.mark.parametrize("reply", [b"", b"{}", b"[]", b'{"reply": "granted"}', b'{"reply": "done", "x": 1}'])
def test_a_reply_that_is_none_is_waited_out(reply: bytes) -> None:
    with pytest.raises(Unavailable):
        ScopedLedger(lambda body: reply, ME).refresh()


def test_every_request_says_who_asks() -> None:
    asked: list[Request] = []

    def ask(body: bytes) -> bytes:
        asked.append(REQUEST.validate_json(body))
        return REPLY.dump_json(Refused(error="AccessDenied", reason="no"))

    with pytest.raises(AccessDenied):
        ScopedStore("s3://b", ask, ME).get("a/key")
    assert asked == [Request(caller=ME, asked=Read(key="a/key"))]


def test_a_node_never_lists_deletes_or_makes_log_entries() -> None:
    def never(body: bytes) -> bytes:
        raise AssertionError("it is not even asked for")

    store = ScopedStore("s3://b", never, ME)
    refused_calls: list[Callable[[], object]] = [
        lambda: store.list("runs/"),
        lambda: store.delete(["a"]),
        lambda: store.create("a", b""),
        lambda: store.abort_uploads("runs/"),
        lambda: store.unfinished("runs/"),
    ]
    for call in refused_calls:
        with pytest.raises(AccessDenied, match="scoped node may not"):
            call()


def test_a_grant_never_shows_itself() -> None:
    granted = Granted(url="https://s/?X-Amz-Signature=abc", headers={"Content-MD5": "xyz"})
    assert "abc" not in f"{granted!r} {granted}"
    assert "xyz" not in repr(granted)


def test_an_agent_forgets_credentials_and_what_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "x")
    forget_credentials()
    assert {name for name in os.environ if name.startswith("AWS_")} == {"AWS_CA_BUNDLE"}


GRID = """
parameters: {{seed: {{values: [1]}}}}
base: {{model: owner/name}}
dataset: {{path: images}}
storage: {{url: "{url}", credentials: {credentials}}}
"""


@pytest.mark.parametrize(
    ("url", "credentials", "code"),
    [
        ("s3://bucket", "scoped", None),
        ("s3://bucket", "env", None),
        ("file:///srv/loras", "env", None),
        ("file:///srv/loras", "scoped", "E2125"),
        ("s3://bucket", "stolen-secret", "E2120"),
    ],
)
def test_a_sweep_file_says_who_holds_the_keys(
    url: str, credentials: str, code: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(url=url, credentials=credentials))
    if code is None:
        assert load(file).storage.credentials == credentials
        return
    with pytest.raises(InvalidFile, match=code):
        load(file)


def test_a_store_without_create_only_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.format(url="s3://bucket", credentials="scoped"))
    with pytest.raises(PreflightFailed, match="E2605"):
        start(load(file), "s3://bucket", arbitrated=True)
    with pytest.raises(PreflightFailed, match="E2605"):  # and no cluster is asked for
        refuse_unrunnable(
            load(file), MemoryStore(), ProbeResult(False, "races"), address="127.0.0.1:1", insecure=False
        )


def test_an_attempt_resumes_from_what_is_left_after_a_quarantine() -> None:
    earlier = replace(STATE, checkpoints=STATE.checkpoints[:1])
    check_read(earlier, ME, data_key(10), LIMITS)
    with pytest.raises(AccessDenied):
        check_read(earlier, ME, data_key(20), LIMITS)
