"""What gc takes and leaves on real servers: listings, clocks, unfinished uploads, refused deletes."""

import itertools
import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.cleaning import lived
from support.fake_cluster import small_sweep
from support.fault_proxy import FaultProxy
from support.faults import FOREVER, LoseReply, Status, matching
from support.flaky_store import Died, Fault, FlakyStore
from support.invariants import leftovers as unexplained
from support.invariants import violations
from support.runs import finished, incarnation
from support.s3_servers import S3Server

from orchestrator.cli import main
from orchestrator.commands.cleaning import carry_out, look, survey
from storage import layout
from storage.garbage.collecting import Collected, store_time
from storage.garbage.inventory import take
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.s3.store import S3Store
from storage.url import open_store

CAT = small_sweep(runs=1, name="cat")
R0 = CAT.runs[0].run_id
_corners = itertools.count()


@pytest.fixture(params=["radosgw", "rclone"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str, request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(kind)
    return found


@pytest.fixture
def url(server: S3Server) -> str:
    return server.url_of(f"garbage-{next(_corners)}")


def collected(store: ObjectStore, *, atomic: bool = True) -> Collected:
    """One ``gc --apply`` without grace: the sweep's is 0."""
    done = Collected()
    plan = survey(store, look(store))
    for part in carry_out(store, plan, lambda sweep, run: run_log(store, run) if atomic else None):
        done.add(part)
    return done


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def started_upload(store: S3Store, key: str) -> None:
    """What a node leaves that dies between two parts."""
    client = store._client.requests
    client.create_multipart_upload(Bucket=store._bucket, Key=store._key(key))


def test_gc_leaves_what_is_kept_and_nothing_else(url: str, tmp_path: Path) -> None:
    store = open_store(url, check_then_put=True)
    lived(store, CAT, tmp_path)
    run_log(store, R0).append(finished())

    first, second = collected(store), collected(store)

    assert (first.retired, first.objects) == (3, 1)
    assert (second.retired, second.objects) == (0, 6)
    state = run_log(store, R0).refresh()
    assert violations(store, R0) == []
    assert [c.step for c in state.checkpoints] == [40, 50]
    assert unexplained(store, R0, state) == []
    assert collected(store) == Collected()


def test_a_listing_tells_the_stores_own_time(url: str) -> None:
    store = open_store(url)
    store.put(f"probe/{uuid.UUID(int=1)}/0", b"now")

    now = store_time(store, take(store))

    [info] = take(store).probes
    assert now is not None
    assert info.modified_s is not None
    assert -5 <= now - info.modified_s <= 3600


def test_a_collection_cut_off_at_any_call_is_finished_by_the_next(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    radosgw: S3Server = request.getfixturevalue("radosgw")
    for at in range(2, 80, 13):
        store = open_store(radosgw.url_of(f"garbage-{next(_corners)}"))
        lived(store, CAT, tmp_path)
        run_log(store, R0).append(finished())
        flaky = FlakyStore(store, at, Fault.DIE_HALF_WAY)
        with suppress(Died):
            collected(flaky)
        assert violations(store, R0) == []
        collected(store)
        collected(store)
        state = run_log(store, R0).refresh()
        assert (violations(store, R0), unexplained(store, R0, state)) == ([], [])
        assert [c.step for c in state.checkpoints] == [40, 50]
        if flaky.calls < at:
            return
    raise AssertionError("a collection took more calls than expected")


def test_unfinished_uploads_of_fenced_attempts_end_and_a_live_attempts_go_on(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    radosgw: S3Server = request.getfixturevalue("radosgw")
    store = open_store(radosgw.url_of(f"garbage-{next(_corners)}"))
    assert isinstance(store, S3Store)
    lived(store, CAT, tmp_path)
    fenced = layout.checkpoint_file(R0, 1, incarnation(1), 40, "big")
    live = layout.checkpoint_file(R0, 2, incarnation(2), 60, "big")
    young = layout.content_file("0" * 64, "0badcafe", "f" * 64)
    for key in (fenced, live, young):
        started_upload(store, key)

    collected(store)
    assert sorted(info.key for info in store.unfinished("")) == [young, live]

    run_log(store, R0).append(finished())
    collected(store)
    assert [info.key for info in store.unfinished("")] == [young]


@pytest.fixture
def proxied(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FaultProxy(server.endpoint) as proxy:
        monkeypatch.setenv("ORCHESTRATE_STORE", url.replace(server.endpoint, proxy.endpoint))
        yield proxy


def test_deletes_that_are_denied_are_told_once_and_cost_nothing_but_space(
    url: str, proxied: FaultProxy, tmp_path: Path
) -> None:
    store = open_store(url, check_then_put=True)
    lived(store, CAT, tmp_path)
    run_log(store, R0).append(finished())
    proxied.inject(Status(403, "AccessDenied"), when=matching("DELETE", "/data/"), times=FOREVER)

    result = run("gc", "--apply")

    assert result.exit_code == 5, result.output
    assert result.stderr.count("403 AccessDenied") == 1
    assert "training is not affected" in result.stderr
    assert violations(store, R0) == []
    assert any("half" in info.key for info in store.list(layout.data_prefix(R0)))
    proxied.heal()
    assert run("gc", "--apply").exit_code == 0
    assert not any("half" in info.key for info in store.list(layout.data_prefix(R0)))


def test_where_create_only_does_not_hold_gc_appends_nothing(
    url: str, kind: str, proxied: FaultProxy, tmp_path: Path
) -> None:
    store = open_store(url, check_then_put=True)
    lived(store, CAT, tmp_path)
    run_log(store, R0).append(finished())
    before = sum(1 for _ in store.list(layout.run_log_prefix(R0)))

    result = run("gc", "--apply")

    assert result.exit_code == 0, result.output
    after = sum(1 for _ in store.list(layout.run_log_prefix(R0)))
    refused = "cannot be deleted from this store" in result.stderr
    assert (after - before, refused) in [(1, False), (0, True)]
    assert refused == (kind == "rclone")
    assert "deleted 1 object, 1.0 kB" in result.stderr


@pytest.mark.parametrize("kind", ["radosgw"], indirect=True)  # on the other gc appends nothing
def test_a_record_whose_reply_is_lost_is_written_once(proxied: FaultProxy, url: str, tmp_path: Path) -> None:
    store = open_store(url)
    lived(store, CAT, tmp_path)
    run_log(store, R0).append(finished())
    proxied.inject(LoseReply(), when=matching("PUT", f"{R0}/log/"))

    assert run("gc", "--apply").exit_code == 0

    kinds = [
        json.loads(store.get(info.key))["record"]["kind"] for info in store.list(layout.run_log_prefix(R0))
    ]
    assert kinds.count("retired") == 1
    assert violations(store, R0) == []
