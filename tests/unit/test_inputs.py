"""A node trains from the paths of the spec if they are right here, else from verified copies."""

import shutil
import threading
from pathlib import Path

import pytest
from support.runs import RUN, claimed, incarnation
from support.single_file import write_single_file
from support.tiny_world import tiny_spec
from support.training import contents, events, lay_out, newest

from storage import layout
from storage.content.store import content_log, store_for
from storage.errors import Corrupt
from storage.log import run_log
from storage.memory import MemoryStore
from trainer.attempt import run_attempt
from trainer.config import RunSpec
from trainer.dataset.folder import dataset_content
from trainer.errors import BadInput
from trainer.inputs import with_inputs
from trainer.model_files import model_content
from trainer.rundir import EXIT_COMPLETE, CheckpointPolicy, Options
from trainer.stop import Stop
from trainer.supervisor import Assignment, Supervisor

STOPPING = threading.Event()


@pytest.fixture(scope="module")
def pinned(world: Path) -> RunSpec:
    digests = {
        "base": {"digest": model_content(world / "base").digest, "max_train_steps": 2},
        "dataset": {"digest": dataset_content(world / "images").digest},
    }
    return tiny_spec(world / "base", world / "images", **digests)


@pytest.fixture
def store(world: Path) -> MemoryStore:
    store = MemoryStore()
    for local in (dataset_content(world / "images"), model_content(world / "base")):
        store_for(store, "cat", local, submitted=False)
    return store


def elsewhere(spec: RunSpec, folder: str = "/home/ann/cats") -> RunSpec:
    """The run as a node sees it that has none of the submitter's folders."""
    return spec.model_copy(
        update={
            "base": spec.base.model_copy(update={"model": f"{folder}/base"}),
            "dataset": spec.dataset.model_copy(update={"path": f"{folder}/images"}),
        }
    )


def train(spec: RunSpec, options: Options, root: Path) -> dict[str, bytes]:
    run_dir = lay_out(root, spec, cache=Path(options.cache_dir or ""))
    laid = Options.model_validate_json(run_dir.options.read_bytes())
    run_dir.options.write_text(laid.model_copy(update={"content": options.content}).model_dump_json())
    assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
    assert events(run_dir, "complete")
    return contents(newest(run_dir))


def test_a_run_from_fetched_content_is_the_run_from_the_paths(
    store: MemoryStore, pinned: RunSpec, tmp_path: Path
) -> None:
    options = Options(cache_dir=str(tmp_path / "cache"))
    here = train(pinned, options, tmp_path / "here")

    with with_inputs(store, elsewhere(pinned), options, STOPPING) as resolved:
        assert set(resolved.content) == {pinned.base.digest, pinned.dataset.digest}
        there = train(elsewhere(pinned), resolved, tmp_path / "there")

    assert there == here


def test_paths_that_are_right_are_used_and_nothing_is_fetched(
    store: MemoryStore, pinned: RunSpec, tmp_path: Path
) -> None:
    with with_inputs(store, pinned, Options(cache_dir=str(tmp_path)), STOPPING) as resolved:
        assert resolved.content == {}
    assert not list((tmp_path / "content").glob("*"))


def test_a_folder_that_changed_is_passed_over_for_what_was_submitted(
    store: MemoryStore, pinned: RunSpec, world: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(world / "images", tmp_path / "images")
    (changed / "00.txt").write_text("another caption")
    spec = pinned.model_copy(update={"dataset": pinned.dataset.model_copy(update={"path": str(changed)})})

    with with_inputs(store, spec, Options(cache_dir=str(tmp_path / "cache")), STOPPING) as resolved:
        assert set(resolved.content) == {pinned.dataset.digest}
        (copy,) = resolved.content.values()
        assert dataset_content(Path(copy)).digest == pinned.dataset.digest


def test_a_single_file_comes_with_the_configuration_beside_it(world: Path, tmp_path: Path) -> None:
    weights = write_single_file(world / "base", tmp_path / "sd.safetensors")
    config = shutil.copytree(world / "base", tmp_path / "sd")
    for path in config.rglob("*.safetensors"):
        path.unlink()
    local, store = model_content(weights), MemoryStore()
    store_for(store, "cat", local, submitted=False)
    spec = tiny_spec(Path("/gone/sd.safetensors"), world / "images", base={"digest": local.digest})

    with with_inputs(store, spec, Options(cache_dir=str(tmp_path / "cache")), STOPPING) as resolved:
        copy = Path(resolved.content[local.digest])
        assert copy.name == "sd.safetensors"
        assert model_content(copy).digest == local.digest


def test_what_is_nowhere_is_told_in_the_users_words(pinned: RunSpec, tmp_path: Path) -> None:
    spec = elsewhere(pinned)
    with with_inputs(MemoryStore(), spec, Options(cache_dir=str(tmp_path)), STOPPING) as resolved:
        run_dir = lay_out(tmp_path / "run", spec, cache=tmp_path)
        assert resolved.content == {}
        with pytest.raises(BadInput, match="dataset /home/ann/cats/images: no such folder"):
            run_attempt(run_dir, Stop())


def test_errors_name_the_users_path_and_not_the_copys(
    store: MemoryStore, pinned: RunSpec, tmp_path: Path
) -> None:
    spec = elsewhere(pinned)
    with with_inputs(store, spec, Options(cache_dir=str(tmp_path / "c")), STOPPING) as resolved:
        shutil.rmtree(resolved.content[pinned.base.digest or ""] + "/unet")
        with pytest.raises(BadInput) as refused:
            train(spec, resolved, tmp_path / "run")
    assert "/home/ann/cats/base" in str(refused.value)
    assert str(tmp_path / "c") not in str(refused.value) + refused.value.hint


def test_damaged_content_is_told_and_not_trained_from(
    store: MemoryStore, pinned: RunSpec, tmp_path: Path
) -> None:
    digest = pinned.dataset.digest or ""
    stored = content_log(store, digest).refresh().readable
    assert stored is not None
    (key, *_) = [info.key for info in store.list(layout.content_data_prefix(digest, stored.incarnation))]
    store.put(key, b"other bytes")

    with (
        pytest.raises(Corrupt, match="the object is damaged"),
        with_inputs(store, elsewhere(pinned), Options(cache_dir=str(tmp_path)), STOPPING),
    ):
        pass


def test_a_supervised_attempt_needs_nothing_but_the_store(
    store: MemoryStore, pinned: RunSpec, tmp_path: Path
) -> None:
    log = run_log(store, RUN)
    log.append(claimed(1))
    policy = CheckpointPolicy(every_s=30.0, auto_max_s=600.0)
    supervisor = Supervisor(
        store,
        Assignment(run_id=RUN, attempt=1, incarnation=incarnation(1)),
        elsewhere(pinned),
        Options(threads=1, cache_dir=str(tmp_path / "cache"), checkpoint=policy),
        scratch=tmp_path / "scratch",
        ledger=log,
    )

    progress = supervisor.run()

    assert (progress.exit_code, progress.error) == (EXIT_COMPLETE, "")
    assert log.refresh().result is not None
    shipped = b"".join(store.get(info.key) for info in store.list(layout.events_prefix(RUN)))
    assert b'"event": "interval"' in shipped, "the trainer follows the interval that the supervisor wrote"
