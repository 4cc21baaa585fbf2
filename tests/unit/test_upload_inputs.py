"""What ``sweep`` does with the local inputs of a sweep: in the store before the sweep is, and once."""

import contextlib
import threading
from pathlib import Path

import pytest
from support.flaky_store import Died, Fault
from support.interrupted_store import InterruptedStore
from support.shared_content import SharedFlakyStore
from support.tiny_world import build_images

from orchestrator.amounts import size_text
from orchestrator.errors import PreflightFailed
from orchestrator.grid.inputs import are_uploaded, local_inputs, shown_upload
from orchestrator.grid.submission import submit, sweep_names
from orchestrator.grid.sweep import Sweep, load
from storage.content import store as content
from storage.content.state import unreferenced
from storage.content.store import content_log
from storage.directory import DirectoryStore
from storage.garbage.inventory import take
from storage.memory import MemoryStore
from storage.object_store import ObjectStore
from trainer.inputs import with_inputs
from trainer.rundir import Options

GRID = """
name: cat
storage: {url: "s3://loras/x"%s}
base: {model: ./base, max_train_steps: 10}
dataset: {path: ./images}
parameters: {seed: {values: [1, 2]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_images(tmp_path / "images", count=2)
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "base" / "unet" / "weights.safetensors").write_bytes(b"weights" * 100)
    return tmp_path


def planned(folder: Path, extra: str = "") -> Sweep:
    (folder / "grid.yaml").write_text(GRID % extra)
    return load(folder / "grid.yaml")


def contents(store: ObjectStore) -> set[str]:
    return set(take(store).contents)


def users(store: ObjectStore, digest: str) -> set[str]:
    live = content_log(store, digest).refresh().live
    return {user.sweep for user in live.users} if live else set()


def wanted(sweep: Sweep) -> set[str | None]:
    return {sweep.runs[0].spec.dataset.digest, sweep.runs[0].spec.base.digest}


def test_each_input_is_in_the_store_once_for_all_runs_and_sweeps(folder: Path, tmp_path: Path) -> None:
    sweep, store, sent = planned(folder), MemoryStore(), list[int]()
    assert submit(sweep, store, sent.append) is True
    assert contents(store) == wanted(sweep)
    assert (
        sum(sent)
        == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        - (folder / "grid.yaml").stat().st_size
    )

    again = list[int]()
    assert submit(sweep, store, again.append) is False
    assert submit(sweep.model_copy(update={"name": "dog"}), store, again.append) is True
    assert again == []
    assert all(users(store, digest) == {"cat", "dog"} for digest in contents(store))


def test_a_node_without_the_folders_finds_them_in_the_store(folder: Path, tmp_path: Path) -> None:
    sweep, store = planned(folder), MemoryStore()
    submit(sweep, store)
    (folder / "images").rename(folder / "moved")
    options = Options(cache_dir=str(tmp_path / "cache"))

    with with_inputs(store, sweep.runs[0].spec, options, threading.Event()) as resolved:
        (copy,) = resolved.content.values()
        names = {path.name for path in Path(copy).iterdir()}
    assert names == {path.name for path in (folder / "moved").iterdir()}


@pytest.mark.parametrize(
    ("extra", "in_folder", "in_bucket"),
    [("", False, True), (", upload_inputs: always", True, True), (", upload_inputs: never", False, False)],
)
def test_a_folder_gets_no_copies_unless_asked_for(
    extra: str, in_folder: bool, in_bucket: bool, folder: Path, tmp_path: Path
) -> None:
    storage = planned(folder, extra).storage
    assert are_uploaded(storage, DirectoryStore(tmp_path / "store")) is in_folder
    assert are_uploaded(storage, MemoryStore()) is in_bucket


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
def test_a_sweep_that_exists_has_its_inputs_wherever_submitting_dies(fault: Fault, folder: Path) -> None:
    sweep = planned(folder)
    undisturbed = SharedFlakyStore(MemoryStore(), 0, fault)
    submit(sweep, undisturbed)
    for at in range(1, undisturbed.calls + 1):
        store = MemoryStore()
        with contextlib.suppress(Died):
            submit(sweep, SharedFlakyStore(store, at, fault))
        for _ in range(2):
            if sweep_names(store):
                assert all(users(store, digest or "") == {"cat"} for digest in wanted(sweep))
            submit(sweep, store)


def test_gc_at_any_point_of_submitting_costs_the_sweep_no_input(folder: Path) -> None:
    sweep = planned(folder)

    def collect(store: ObjectStore) -> None:
        for digest in contents(store):
            log = content_log(store, digest)
            state, seen = log.refresh(), content.incarnations(store, digest)
            for what in unreferenced(state, sweep_names(store), seen):
                content.retire(log, what)
            content.reap(store, digest, log, sweep_names(store))

    calm = InterruptedStore(0, collect)
    submit(sweep, calm)
    for at in range(1, calm.calls + 1):
        store = InterruptedStore(at, collect)
        submit(sweep, store)
        for digest in wanted(sweep):
            assert users(store, digest or "") == {"cat"}, f"gc before call {at}"


def test_an_input_that_changed_since_it_was_pinned_is_refused(folder: Path) -> None:
    sweep, store = planned(folder), MemoryStore()
    (folder / "images" / "00.txt").write_text("another caption")

    with pytest.raises(PreflightFailed, match=r"dataset .*images has other content"):
        submit(sweep, store)
    assert sweep_names(store) == []


def test_the_upload_is_told_once_and_only_if_there_is_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, store = planned(folder), MemoryStore("loras")
    for _ in range(2):
        with shown_upload(sweep, store) as on_sent:
            submit(sweep, store, on_sent)
    size = size_text(sum(local.listing.size_bytes for _, local in local_inputs(sweep)))
    assert "GB" not in size
    assert capsys.readouterr().err == f"uploading inputs, {size}, to memory://loras\n"
