"""From ``grid.yaml`` to runs: their order, their ids, and what a changed file changes."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidFile, Unknown
from orchestrator.grid.schema import BLOCKS, Checkpoint, Grid, Metric, Notices, Recovery, Resources, Storage
from orchestrator.grid.sweep import Sweep, differences, load, validate
from trainer.config import RunSpec
from trainer.dataset.folder import dataset_digest
from trainer.model_files import model_digest

GRID = """\
method: grid
parameters:
  learning_rate: {values: [5e-5, 1e-4]}
  rank: {values: [8, 16]}
  alpha: {value: "${parameters.rank}"}
base: {model: owner/model}
dataset: {path: data}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a sweep file beside a small dataset folder; return its path."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.png").write_bytes(b"pixels")
    (folder / "data" / "a.txt").write_text("a caption")

    def write_file(text: str = GRID, name: str = "my_Grid.yaml") -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write_file


def cells(sweep: Sweep) -> list[tuple[Any, ...]]:
    return [tuple(run.parameters.values()) for run in sweep.runs]


def test_the_last_parameter_changes_fastest(write: Write) -> None:
    sweep = load(write())
    assert cells(sweep) == [(5e-5, 8, 8), (5e-5, 16, 16), (1e-4, 8, 8), (1e-4, 16, 16)]
    assert [run.index for run in sweep.runs] == [0, 1, 2, 3]
    assert [(r.spec.base.learning_rate, r.spec.base.rank, r.spec.base.alpha) for r in sweep.runs] == [
        (5e-5, 8, 8.0),
        (5e-5, 16, 16.0),
        (1e-4, 8, 8.0),
        (1e-4, 16, 16.0),
    ]


def test_include_comes_last_and_exclude_removes(write: Write) -> None:
    include = "include: [{learning_rate: 1e-3, rank: 4}, {network_dim: 4, learning_rate: 1e-2, alpha: 1}]\n"
    exclude = "exclude: [{rank: 16, learning_rate: 0.0001}, {learning_rate: 5e-5, alpha: 8}]\n"
    assert cells(load(write(GRID + include + exclude))) == [
        (5e-5, 16, 16),
        (1e-4, 8, 8),
        (1e-3, 4, 4),
        (1e-2, 4, 1),
    ]


def test_run_cap_keeps_the_first_runs_and_says_how_many_it_left_out(write: Write) -> None:
    sweep = load(write(GRID + "run_cap: 3\n"))
    assert (len(sweep.runs), sweep.left_out) == (3, 1)
    assert [run.run_id for run in sweep.runs] == [run.run_id for run in load(write()).runs[:3]]


def test_a_file_with_the_least_possible_gets_the_defaults(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_STORE", raising=False)
    text = "parameters: {seed: {value: 3}}\nbase: {model: owner/model}\ndataset: {path: data}\n"
    sweep = load(write(text))
    assert sweep == Sweep(
        name="my-grid",
        metric=Metric(name="val/loss", goal="minimize"),
        resources=Resources(gpus=1, cpus=1),
        storage={"url": f"file://{tmp_path}/orchestrate-store"},
        checkpoint=Checkpoint(every="120s", keep_last=2),
        recovery=Recovery(max_failures=3),
        pins=sweep.pins,
        runs=sweep.runs,
    )
    assert [run.parameters for run in sweep.runs] == [{"seed": 3}]


def test_any_key_of_a_spec_may_be_a_parameter(write: Write) -> None:
    text = GRID.replace(
        "parameters:\n",
        "parameters:\n  dataset.caption_dropout: {values: [0, 0.1]}\n  samples.cfg: {value: 3}\n"
        "  base.targets: {values: [[to_q], [to_k, to_v]]}\n",
    )
    first, *_, last = load(
        write(text + "samples: {prompts: ['${parameters.rank} of ${parameters.rank} [trigger]']}\n")
    ).runs
    assert (first.spec.dataset.caption_dropout, last.spec.dataset.caption_dropout) == (0.0, 0.1)
    assert last.spec.base.targets == ("to_k", "to_v")
    assert last.spec.samples is not None
    assert last.spec.samples.cfg == 3.0
    assert last.spec.samples.prompts == ("16 of 16 [trigger]",)
    assert list(last.parameters) == [
        "dataset.caption_dropout",
        "samples.cfg",
        "targets",
        "learning_rate",
        "rank",
        "alpha",
    ]


def test_kohyas_names_mean_ours(write: Write) -> None:
    ours = load(write())
    text = (
        GRID.replace("learning_rate", "unet_lr")
        .replace("rank:", "network_dim:")
        .replace("alpha", "network_alpha")
    )
    assert load(write(text)) == ours
    in_base = load(write(GRID.replace("owner/model}", "owner/model, network_dim: 3}")))
    assert in_base.runs == ours.runs


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


def test_a_name_that_looks_like_a_number_is_a_name(write: Write) -> None:
    assert load(write(), overrides=["name=2024"]).name == "2024"


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


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [("200", 200, None), ("120s", None, 120.0), ("1.5m", None, 90.0), ("1h", None, 3600.0)],
)
def test_checkpoints_are_due_by_steps_or_by_time(
    every: str, steps: int | None, seconds: float | None, write: Write
) -> None:
    policy = load(write(f"{GRID}checkpoint: {{every: {every}}}\n")).checkpoint.policy
    assert (policy.every_steps, policy.every_s) == (steps, seconds)


def test_without_held_out_images_nothing_ranks_the_runs(write: Write) -> None:
    assert load(write(GRID.replace("path: data", "path: data, val_fraction: 0"))).metric is None


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("./store", "file://{cwd}/store"),
        ("file://./store", "file://{cwd}/store"),
        ("/srv/x", "file:///srv/x"),
        ("s3://bucket/a?endpoint=https://host", "s3://bucket/a?endpoint=https://host"),
    ],
)
def test_a_store_in_a_folder_is_relative_to_the_working_directory(
    url: str, absolute: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = load(write(f"{GRID}storage: {{url: '{url}'}}\n"))
    assert sweep.storage.url == absolute.format(cwd=tmp_path)


def test_a_run_is_found_by_its_id(write: Write) -> None:
    sweep = load(write())
    assert sweep.run(sweep.runs[1].run_id) is sweep.runs[1]
    with pytest.raises(Unknown, match=f"did you mean '{sweep.runs[1].run_id}'") as caught:
        sweep.run(sweep.runs[1].run_id[:-1])
    assert caught.value.exit_code == 4


def test_checking_a_file_imports_nothing_heavy(write: Write) -> None:
    heavy = ["torch", "ray", "boto3", "PIL", "diffusers", "numpy"]
    code = (
        "import sys; from pathlib import Path; from orchestrator.grid.sweep import validate; "
        f"validate(Path({str(write())!r})); print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


FULL = {
    "name": "x",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "learning_rate": {"values": [1e-4, 1e-3]},
        "rank": {"value": "${parameters.seed}"},
        "seed": {"values": [1, 2]},
    },
    "include": [{"learning_rate": 3e-4, "seed": 5}],
    "exclude": [{"seed": 1, "learning_rate": 1e-4}],
    "base": {"model": "a/b", "max_train_steps": 10},
    "dataset": {"path": "data"},
    "samples": {"prompts": ["a ${parameters.rank}"]},
    "evaluate": {"command": ["python", "x.py"]},
    "storage": {"url": "./s"},
    "checkpoint": {"every": "5m"},
}
SCALARS = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, "x", "${parameters.seed}", "~nobody/x", "a\0b", "1m", "é"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["value", "values", "seed", "path", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)


def replaced(value: Any, draw: st.DrawFn) -> Any:
    """One value, somewhere inside, replaced by anything."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = replaced(value[key], draw)
        return copy
    return draw(VALUES)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.composite(
        lambda draw: {**FULL, (key := draw(st.sampled_from(sorted(FULL)))): replaced(FULL[key], draw)}
    )()
)
def test_whatever_a_file_holds_is_a_sweep_or_a_list_of_problems(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(data))
    try:
        count = len(validate(file).cells)
    except InvalidFile as error:
        count = len(error.problems)
    assert count > 0


ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "grid.md").read_text()


WHOLE_FILES = [
    text for text in re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL) if "parameters:" in text
]


@pytest.mark.parametrize("text", WHOLE_FILES, ids=["least", "whole"])
def test_the_files_in_the_reference_are_right(text: str, write: Write) -> None:
    path = write(text)
    (path.parent / "score.py").write_text("")
    assert len(validate(path).cells) in (2, 9)


def test_the_examples_of_data_are_right(write: Write) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    assert len(examples) > 5
    for text in examples:
        path = write(f"parameters: {{rank: {{values: [1, 2]}}}}\n{text}")
        assert len(validate(path, overrides=["base.model=owner/model"]).cells) == 2


def test_the_reference_names_every_key() -> None:
    named = {
        word for words in re.findall(r"`([^`\n]+)`", REFERENCE) for word in re.findall(r"[a-z0-9_]+", words)
    }
    models = [Grid, Metric, Resources, Notices, Storage, Checkpoint, Recovery, *BLOCKS.values()]
    assert {key for model in models for key in model.model_fields} - named == set()


def test_the_reference_explains_every_code() -> None:
    sources = (ROOT / "orchestrator").rglob("*.py")
    used = {code for path in sources for code in re.findall(r'"([EW]2\d{3})"', path.read_text())}
    assert used == set(re.findall(r"^\| ([EW]2\d{3}) \|", REFERENCE, re.MULTILINE))
