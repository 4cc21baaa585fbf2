"""A data set under a prefix of a bucket: downloaded once, a change is noticed."""

from pathlib import Path
from threading import Event

import pytest
from PIL import Image
from support.s3_servers import S3Server

from orchestrator.grid.inputs import local_inputs, store_inputs
from orchestrator.grid.sweep import load
from orchestrator.launching.data import dataset_problems
from storage.url import open_store
from trainer.config import Base, Dataset, RunSpec
from trainer.dataset.folder import dataset_digest, scan
from trainer.dataset.sources import local_folder, pin
from trainer.errors import BadInput, BaseUnavailable
from trainer.inputs import with_inputs
from trainer.run_dataset import examples_of
from trainer.rundir import Options


def test_a_prefix_becomes_a_folder_and_a_change_is_noticed(rclone: S3Server, tmp_path: Path) -> None:
    url = rclone.url_of("photos")
    store, cache = open_store(url), tmp_path / "cache"
    for name in ("a.png", "2_sks dog/ünï.png"):
        Image.new("RGB", (16, 8), "red").save(tmp_path / "image.png")
        store.put(name, tmp_path / "image.png")
    store.put("a.txt", b"a dog")
    store.put("notes.md", b"not part of it")
    dataset = Dataset(path=url, val_fraction=0)

    first = pin(dataset, cache)
    with local_folder(dataset, cache) as folder:
        assert [example.caption for example in scan(dataset, folder)] == ["sks dog", "a dog"]
        assert not (folder / "notes.md").exists()
        assert dataset_digest(folder) == first.digest
        before = folder
    with local_folder(dataset, cache) as folder:
        assert folder == before, "downloaded once"

    store.put("a.txt", b"a cat")  # of the same size
    assert pin(dataset, cache).digest != first.digest
    spec = RunSpec(base=Base(model="m"), dataset=dataset.model_copy(update={"digest": first.digest}))
    with (
        pytest.raises(BadInput, match="its files differ from those at submission"),
        examples_of(spec, Options(cache_dir=str(cache)), lambda: None),
    ):
        pass
    rclone.kill()
    try:
        with pytest.raises(BaseUnavailable, match="dataset s3://"):
            pin(dataset, cache)
    finally:
        rclone.restart()


def test_a_sweep_is_pinned_to_what_lies_there_and_can_bring_it_to_its_nodes(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url, folder = rclone.url_of("sweep"), tmp_path / "same"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (16, 8), (index, 0, 0)).save(folder / f"{index}.png")
        open_store(url).put(f"{index}.png", folder / f"{index}.png")
    grid = "parameters: {rank: {values: [2, 4]}}\nbase: {model: owner/model, revision: x}\n"
    sweeps = []
    for path in (url, str(folder)):
        file = tmp_path / "grid.yaml"
        file.write_text(f"{grid}dataset: {{path: '{path}', caption: a dog, val_fraction: 0}}\n")
        sweeps.append(load(file))

    there, here = sweeps
    assert there.runs[0].spec.dataset.digest == dataset_digest(folder)
    assert [run.run_id for run in there.runs] == [run.run_id for run in here.runs], "of equal content"
    assert list(dataset_problems(run.spec for run in there.runs)) == []
    [(what, _)] = local_inputs(there)
    assert what == f"dataset {url}"
    store_inputs(there, open_store(str(tmp_path / "store")), submitted=False, on_sent=lambda size: None)
    spec = there.runs[0].spec
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a node has no key of that bucket")
    options = Options(cache_dir=str(tmp_path / "node"))
    with (
        with_inputs(open_store(str(tmp_path / "store")), spec, options, Event()) as placed,
        examples_of(spec, placed, lambda: None) as examples,
    ):
        assert [example.name for example in examples] == ["0.png", "1.png"]


def test_what_holds_no_images_is_named(rclone: S3Server, tmp_path: Path) -> None:
    for url, said in (
        (rclone.url_of("nothing-here"), "no PNG, JPEG or WebP image under this prefix"),
        (rclone.url.replace("s3://loras", "s3://no-such-bucket"), "dataset s3://no-such-bucket"),
    ):
        with pytest.raises(BadInput, match=said):
            pin(Dataset(path=url), tmp_path)
