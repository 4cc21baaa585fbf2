"""A data set under a prefix of a bucket: downloaded once, a change is noticed."""

from pathlib import Path

import pytest
from PIL import Image
from support.s3_servers import S3Server

from storage.url import open_store
from trainer.config import Dataset
from trainer.dataset.folder import dataset_digest, scan
from trainer.dataset.sources import local_folder, pin
from trainer.errors import BadInput, BaseUnavailable


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
    rclone.kill()
    try:
        with pytest.raises(BaseUnavailable, match="dataset s3://"):
            pin(dataset, cache)
    finally:
        rclone.restart()


def test_what_holds_no_images_is_named(rclone: S3Server, tmp_path: Path) -> None:
    for url, said in (
        (rclone.url_of("nothing-here"), "no PNG, JPEG or WebP image under this prefix"),
        (rclone.url.replace("s3://loras", "s3://no-such-bucket"), "dataset s3://no-such-bucket"),
    ):
        with pytest.raises(BadInput, match=said):
            pin(Dataset(path=url), tmp_path)
