"""The id of a run is the hash of all that decides its result; what a changed file changes is told."""

import hashlib
import json
from pathlib import Path

import pytest
from support.sweep_file import GRID, Write

from orchestrator.grid.sweep import Sweep, differences, load
from trainer.config import RunSpec
from trainer.dataset.folder import dataset_digest
from trainer.model_files import model_digest


def test_the_same_file_gives_the_same_ids(write: Write) -> None:
    sweep = load(write())
    assert [run.run_id for run in load(write()).runs] == [run.run_id for run in sweep.runs]
    assert len({run.run_id for run in sweep.runs}) == 4


def test_an_id_is_the_hash_of_the_spec_without_its_place(write: Write) -> None:
    run = load(write()).runs[2]
    spec = run.spec.model_dump(mode="json", exclude_defaults=True)
    del spec["dataset"]["path"]
    spec["base"]["train_batch_size"] = 1
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    assert run.run_id == f"my-grid-002-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def test_the_same_content_elsewhere_gives_the_same_ids(write: Write, tmp_path: Path) -> None:
    def model_at(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "unet.safetensors").write_bytes(b"weights")
        (folder / "score.py").write_text("print()")

    text = GRID.replace("owner/model", "model") + (
        "samples: {prompts: [x]}\nevaluate: {command: [python, score.py, '{samples}']}\n"
    )
    path = write(text)
    model_at(path.parent)
    here = load(path)
    path.parent.rename(tmp_path / "there")
    folder = tmp_path / "there"
    there = load(folder / path.name)

    assert [run.run_id for run in there.runs] == [run.run_id for run in here.runs]
    assert there.runs[0].spec.base.model == str(folder / "model")
    assert there.runs[0].spec.evaluate is not None
    assert there.runs[0].spec.evaluate.command == (
        "python",
        str(tmp_path / "there" / "score.py"),
        "{samples}",
    )
    assert differences(here, there) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/a.png", "the content of dataset {folder}/data has changed"),
        ("data/a.txt", "the content of dataset {folder}/data has changed"),
        ("model/unet.safetensors", "the content of base model {folder}/model has changed"),
        ("score.py", "evaluate.command: "),
    ],
)
def test_changed_content_gives_other_ids(file: str, line: str, write: Write) -> None:
    text = GRID.replace("owner/model", "./model") + (
        "samples: {prompts: [x]}\nevaluate: {command: [python, score.py]}\n"
    )
    path = write(text)
    (path.parent / "model").mkdir()
    (path.parent / "model" / "unet.safetensors").write_bytes(b"weights")
    (path.parent / "score.py").write_text("print()")
    before = load(path)
    (path.parent / file).write_bytes(b"something else")
    after = load(path)

    assert not {run.run_id for run in before.runs} & {run.run_id for run in after.runs}
    [difference] = differences(before, after)
    assert difference.startswith(line.format(folder=path.parent))


def test_the_dataset_is_pinned(write: Write) -> None:
    path = write()
    digest = dataset_digest(path.parent / "data")
    sweep = load(path)
    assert {run.spec.dataset.digest for run in sweep.runs} == {digest}
    assert sweep.pins == {str(path.parent / "data"): digest}


def test_a_local_base_model_is_pinned_by_its_content(write: Write) -> None:
    path = write(GRID.replace("owner/model", "./model"))
    folder = path.parent / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    before = load(path)
    assert {run.spec.base.digest for run in before.runs} == {model_digest(folder)}

    (folder / "model_index.json").write_text("{ }")
    after = load(path)
    assert not {run.run_id for run in before.runs} & {run.run_id for run in after.runs}
    assert differences(before, after) == [f"the content of base model {folder} has changed"]


def test_a_digest_that_the_file_states_is_kept(write: Write) -> None:
    sweep = load(write(GRID.replace("path: data", f"path: data, digest: {'a' * 64}")))
    assert {run.spec.dataset.digest for run in sweep.runs} == {"a" * 64}


def test_a_missing_dataset_leaves_the_digest_open(write: Write) -> None:
    sweep = load(write(GRID.replace("path: data", "path: absent")))
    assert {run.spec.dataset.digest for run in sweep.runs} == {None}


def test_a_sweep_survives_its_json(write: Write) -> None:
    sweep = load(
        write(GRID + "checkpoint: {every: 5m}\nsamples: {prompts: ['\N{SNOWMAN}'], seeds: [1, 2]}\n")
    )
    assert Sweep.from_json(sweep.to_json()) == sweep
    assert Sweep.from_json(sweep.to_json()).to_json() == sweep.to_json()
    spec = sweep.runs[0].spec
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValueError, match="runs"):
        Sweep.from_json(b"{}")


def test_differences_are_sentences(write: Write) -> None:
    old = load(write())
    new = load(
        write(GRID.replace("[8, 16]", "[8, 32]").replace("owner/model", "other/model")),
        overrides=["checkpoint.every=5", "max_train_steps=7"],
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "checkpoint.every: '120s' before, 5 now",
        "the run with learning_rate=5e-05, rank=16, alpha=16 is gone",
        "the run with learning_rate=0.0001, rank=16, alpha=16 is gone",
        "the run with learning_rate=5e-05, rank=32, alpha=32 is new",
        "the run with learning_rate=0.0001, rank=32, alpha=32 is new",
        "base.model: 'owner/model' before, 'other/model' now",
        "base.max_train_steps: 1000 before, 7 now",
    ]


def test_a_difference_of_some_runs_says_of_how_many(write: Write) -> None:
    both = GRID.replace("rank: {values: [8, 16]}", "rank: {values: [8, 16]}\n  lora_dropout: {value: 0}")
    old, new = load(write(both)), load(write(both.replace("values: [8, 16]", "values: [16, 8]")))
    assert differences(old, new) == ["the order of the runs has changed"]
