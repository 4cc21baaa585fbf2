"""A sweep in the store: written once, found again by name, and never silently changed."""

import contextlib

import pytest
from support.fake_cluster import small_sweep
from support.flaky_store import Died, Fault, FlakyStore

from orchestrator.errors import Ambiguous, InvalidFile, OrchestrateError, Unknown
from orchestrator.grid.schema import Recovery
from orchestrator.grid.submission import find_run, load_submitted, read_spec, submit, sweep_names
from storage import layout
from storage.errors import NotFound
from storage.memory import MemoryStore
from storage.object_store import ObjectStore

CAT, DOG = small_sweep(runs=2, name="cat"), small_sweep(runs=1, name="dog")
CATALOG = small_sweep(runs=1, name="catalog")


def objects(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def filled(*sweeps: object) -> MemoryStore:
    store = MemoryStore("loras")
    for sweep in sweeps or (CAT, DOG):
        submit(sweep, store)  # type: ignore[arg-type]
    return store


def test_a_submitted_sweep_is_read_back_as_it_was() -> None:
    store = MemoryStore()

    assert submit(CAT, store) is True

    assert load_submitted(store, "cat") == CAT
    assert read_spec(store, CAT.runs[1].run_id) == CAT.runs[1].spec
    assert sweep_names(store) == ["cat"]


def test_submitting_the_same_again_changes_nothing() -> None:
    store = filled(CAT)
    before = objects(store)

    assert submit(CAT, store) is False
    assert objects(store) == before


def test_a_changed_sweep_of_the_same_name_is_refused_with_the_differences() -> None:
    store = filled(CAT)
    before = objects(store)
    changed = small_sweep(runs=3, max_steps=7, recovery=Recovery(max_failures=9))

    with pytest.raises(InvalidFile) as refused:
        submit(changed, store)

    assert objects(store) == before
    messages = [problem.message for problem in refused.value.problems]
    assert "sweep cat was submitted before: recovery.max_failures: 3 before, 9 now" in messages
    assert "sweep cat was submitted before: base.max_train_steps: 6 before, 7 now" in messages
    assert "sweep cat was submitted before: the run with seed=2 is new" in messages
    assert {p.code for p in refused.value.problems} == {"E2190"}
    assert {p.hint for p in refused.value.problems} == {
        "give the changed file another name, with 'name:' or --name"
    }


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
def test_a_sweep_exists_exactly_when_its_own_spec_does_wherever_submitting_dies(fault: Fault) -> None:
    undisturbed = FlakyStore(MemoryStore(), 0, fault)
    submit(CAT, undisturbed)
    for at in range(1, undisturbed.calls + 1):
        store = MemoryStore()
        with contextlib.suppress(Died):
            submit(CAT, FlakyStore(store, at, fault))

        if sweep_names(store):
            assert load_submitted(store, "cat") == CAT
            assert all(read_spec(store, run.run_id) == run.spec for run in CAT.runs)
        submit(CAT, store)
        assert load_submitted(store, "cat") == CAT


def test_two_who_submit_the_same_at_once_are_both_right() -> None:
    class Raced(MemoryStore):
        """Somebody else submits just before our last write."""

        def create(self, key: str, body: bytes) -> bool:
            if key == layout.sweep_spec("cat"):
                super().create(key, body)
            return super().create(key, body)

    store = Raced()

    assert submit(CAT, store) is False
    assert load_submitted(store, "cat") == CAT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cta", "no sweep 'cta' in memory://loras — did you mean 'cat'?"),
        ("zebra", "no sweep 'zebra' in memory://loras — there are: cat, dog"),
        ("../up", "no sweep '../up' in memory://loras — there are: cat, dog"),
    ],
)
def test_an_unknown_sweep_is_named_with_what_could_be_meant(name: str, message: str) -> None:
    with pytest.raises(Unknown) as unknown:
        load_submitted(filled(), name)

    assert str(unknown.value) == message
    assert unknown.value.exit_code == 4


def test_an_empty_store_says_that_there_is_none() -> None:
    with pytest.raises(Unknown, match="no sweep 'cat' in memory:// — the store has no sweeps"):
        load_submitted(MemoryStore(), "cat")


def test_a_spec_from_a_newer_version_is_named() -> None:
    store = filled(CAT)
    store.put(layout.sweep_spec("cat"), b'{"version": 1, "name": "cat", "gpus_of_the_future": 1}')

    with pytest.raises(OrchestrateError, match="is no sweep that this version can read"):
        load_submitted(store, "cat")


@pytest.mark.parametrize(
    "name", ["cat/1", CAT.runs[1].run_id, "cat-1", "cat-1-0000", CAT.runs[1].run_id[:-1]]
)
def test_a_run_is_found_by_its_place_or_by_how_its_id_begins(name: str) -> None:
    assert find_run(filled(), name) == (CAT, CAT.runs[1].run_id)


def test_the_only_run_of_a_sweep_is_found_by_the_sweeps_name() -> None:
    assert find_run(filled(), "dog") == (DOG, DOG.runs[0].run_id)


def test_a_beginning_that_several_runs_share_is_ambiguous() -> None:
    with pytest.raises(Ambiguous) as several:
        find_run(filled(CAT, CATALOG), "cat")

    ids = [*(run.run_id for run in CAT.runs), CATALOG.runs[0].run_id]
    assert str(several.value) == f"'cat' could be run {', '.join(ids)} — write more of it"
    assert several.value.exit_code == 4


def test_a_run_id_that_begins_another_one_is_meant_itself() -> None:
    longer = small_sweep(runs=1, name="cat-0-00000000")
    store = filled(CAT, longer)

    assert find_run(store, "cat-0-00000000") == (CAT, "cat-0-00000000")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat/7", "no run 'cat/7' in memory://loras — did you mean 'cat/1'?"),
        ("cat/", "no run 'cat/' in memory://loras — did you mean 'cat/1'?"),
        ("cta/0", "no sweep 'cta' in memory://loras — did you mean 'cat'?"),
        ("cat-9", "no run 'cat-9' in memory://loras — there are: cat-0-00000000, cat-1-00000001"),
        ("zebra", "no run 'zebra' in memory://loras — there are: cat, dog"),
        ("a/b/c", "no sweep 'a' in memory://loras — there are: cat, dog"),
    ],
)
def test_an_unknown_run_is_named_with_what_could_be_meant(name: str, message: str) -> None:
    with pytest.raises(Unknown) as unknown:
        find_run(filled(), name)

    assert str(unknown.value) == message


def test_the_spec_of_a_run_that_is_not_there() -> None:
    with pytest.raises(NotFound):
        read_spec(MemoryStore(), "cat-0")
