"""Everything that a run is made from is pinned, moved and left out of its id alike."""

from pathlib import Path

import pytest

from orchestrator.grid.pins import absolute_paths, identity, pins_of
from trainer.config import RunSpec
from trainer.spec_inputs import inputs_of, moved, pinned

D1, D2 = "1" * 64, "2" * 64


def spec_of(folder: str) -> RunSpec:
    data = {
        "base": {
            "model": "./base",
            "initial_adapter": "start.safetensors",
            "merged_adapters": [{"path": "a.safetensors"}, {"path": "b.safetensors", "weight": 0.5}],
        },
        "dataset": {"path": "images"},
        "prior": {"prompt": "a dog", "path": "dogs"},
    }
    return RunSpec.model_validate(absolute_paths(data, Path(folder)))


def test_every_path_is_made_absolute_and_named_by_its_key() -> None:
    named = {given.key: given.path for given in inputs_of(spec_of("/home/ann"))}
    assert named == {
        "dataset.path": "/home/ann/images",
        "base.model": "/home/ann/base",
        "prior.path": "/home/ann/dogs",
        "base.initial_adapter": "/home/ann/start.safetensors",
        "base.merged_adapters[0].path": "/home/ann/a.safetensors",
        "base.merged_adapters[1].path": "/home/ann/b.safetensors",
    }


def test_what_is_read_from_a_url_stays_as_it_is(tmp_path: Path) -> None:
    data = {"base": {"model": "owner/name"}, "dataset": {"path": "s3://bucket/cats"}}
    assert absolute_paths(data, tmp_path) == data
    assert not any(given.is_path or given.is_here for given in inputs_of(RunSpec.model_validate(data)))


@pytest.mark.parametrize("key", range(6))
def test_the_id_of_a_run_follows_the_content_of_each_input_and_not_its_place(key: int) -> None:
    here, there = spec_of("/home/ann"), spec_of("/srv")
    pins = [{given.path: D1 for given in inputs_of(spec)} for spec in (here, there)]
    mine, theirs = (identity(pinned(s, p), p) for s, p in zip((here, there), pins, strict=True))
    assert mine == theirs
    changed = pins[0] | {inputs_of(here)[key].path: D2}
    assert identity(pinned(here, changed), changed) != mine


def test_contents_that_were_fetched_take_the_places_of_the_paths() -> None:
    spec = spec_of("/home/ann")
    paths = [given.path for given in inputs_of(spec)]
    digests = {path: f"{n:064x}" for n, path in enumerate(paths)}
    fetched = moved(pinned(spec, digests), {digest: f"/cache/{digest[-1]}" for digest in digests.values()})
    assert [given.path for given in inputs_of(fetched)] == [f"/cache/{n}" for n in range(6)]
    assert fetched.base.merged_adapters[1].weight == 0.5


def test_only_what_is_there_is_pinned(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"a")
    found = pins_of([spec_of(str(tmp_path))], tmp_path)
    assert list(found) == [str(tmp_path / "a.safetensors")]
