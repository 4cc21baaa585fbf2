"""From ``grid.yaml`` to runs: their order, and what each is given."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.sweep_file import GRID, Write

from orchestrator.errors import Unknown
from orchestrator.grid.schema import Checkpoint, Metric, Recovery, Resources
from orchestrator.grid.sweep import Sweep, load


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


def test_a_name_that_looks_like_a_number_is_a_name(write: Write) -> None:
    assert load(write(), overrides=["name=2024"]).name == "2024"


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
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
