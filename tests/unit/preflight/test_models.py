"""The base model that a sweep names is there and does what is asked of it, before anything is launched."""

import json
from pathlib import Path

import pytest
from support.preflight import GRID, Check

NO_REVISION = "W2306 base model owner/model is not pinned"


def write_model(
    folder: Path, pipeline: str = "StableDiffusionPipeline", weights: str = "x.safetensors"
) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / weights).write_bytes(b"")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))


def test_a_local_model_passes(data: Path, problems_of: Check) -> None:
    write_model(data.parent / "model")
    assert problems_of(GRID.replace("owner/model", "model")) == []


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("./absent", "E2301", "absent does not exist"),
        ("absent.safetensors", "E2301", "'absent.safetensors' is neither a file nor a hub id"),
        ("a/b/c", "E2301", "'a/b/c' is neither a file nor a hub id"),
        ("sd.ckpt", "E2302", "may contain code that runs when it is loaded — convert it to .safetensors"),
        ("owner/sd.bin", "E2302", "may contain code"),
        ("data/0.txt", "E2302", "0.txt is not a .safetensors file"),
        ("flux", "E2303", "flux is a FluxPipeline — the trainer loads StableDiffusionPipeline, Stable"),
        ("data", "E2303", "data has no readable model_index.json: it is not a diffusers model"),
        ("pickled", "E2304", "pickled has no safetensors weights in unet/"),
        ("sd3", "E2304", "sd3 has no safetensors weights in transformer/"),
    ],
)
def test_39_a_bad_base_model_is_named(
    model: str, code: str, message: str, data: Path, problems_of: Check
) -> None:
    write_model(data.parent / "flux", pipeline="FluxPipeline")
    write_model(data.parent / "pickled", weights="diffusion_pytorch_model.bin")
    write_model(data.parent / "sd3", pipeline="StableDiffusion3Pipeline")
    [problem] = problems_of(GRID.replace("owner/model", model))
    assert problem.startswith(f"base.model {code} ")
    assert message in problem


@pytest.mark.parametrize(
    ("pipeline", "stated", "asked", "said"),
    [
        ("StableDiffusionPipeline", "v_prediction", "prediction_type: epsilon", "that it predicts v_pred"),
        ("StableDiffusionPipeline", "v_prediction", "zero_terminal_snr: true", None),
        ("StableDiffusionPipeline", None, "prediction_type: v_prediction, zero_terminal_snr: true", None),
        ("StableDiffusionPipeline", None, "zero_terminal_snr: true", "take a model with v-prediction"),
        ("StableDiffusionPipeline", None, "clip_skip: 2", None),
        ("StableDiffusionXLPipeline", "epsilon", "clip_skip: 2", "one fixed layer of each"),
        ("StableDiffusion3Pipeline", None, "zero_terminal_snr: true", "leave zero_terminal_snr out"),
        ("StableDiffusion3Pipeline", None, "hollow: auto", "leave hollow out"),
        ("StableDiffusionPipeline", "epsilon", "hollow: up_blocks.1", None),
    ],
)
def test_what_a_base_model_does_not_do_is_refused(
    pipeline: str, stated: str | None, asked: str, said: str | None, data: Path, problems_of: Check
) -> None:
    model = data.parent / "model"
    write_model(model, pipeline)
    (model / "transformer").mkdir()
    (model / "transformer" / "x.safetensors").write_bytes(b"")
    (model / "scheduler").mkdir()
    config = {} if stated is None else {"prediction_type": stated}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))

    found = problems_of(
        GRID.replace("owner/model", "model").replace("resolution: 32", f"resolution: 32, {asked}")
    )

    assert len(found) == (said is not None)
    assert all("E2305" in problem and said is not None and said in problem for problem in found)


def test_timesteps_that_a_base_model_has_not_are_refused(data: Path, problems_of: Check) -> None:
    model = data.parent / "model"
    write_model(model)
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 500}))
    good = GRID.replace("owner/model", "model")

    assert problems_of(good.replace("resolution: 32", "resolution: 32, max_timestep: 500")) == []
    [problem] = problems_of(good.replace("resolution: 32", "resolution: 32, max_timestep: 501"))
    assert problem.startswith("base.max_timestep E2305")
    assert problem.endswith("has 500 timesteps, 0 to 499 — at most 500")


def test_a_hub_model_without_revision_is_a_warning(problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("revision: abc, ", ""))
    assert problem.startswith(f"base.revision {NO_REVISION}")


def test_37_adamw8bit_needs_bitsandbytes(problems_of: Check) -> None:
    text = GRID.replace("resolution: 32", "resolution: 32, optimizer: adamw8bit")
    [problem] = problems_of(text, installed=lambda package: False)
    assert problem.startswith("base.optimizer E2311 optimizer adamw8bit needs bitsandbytes")
    assert problems_of(text, installed=lambda package: package == "bitsandbytes") == []
