"""Settings of adapters that cannot work are refused before anything is launched, with what works instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.tiny_world import tiny_spec

from orchestrator.launching.adapters import adapter_problems
from trainer.config import RunSpec
from trainer.config.layer_sizes import misfit
from trainer.tensor_file import write


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"adapter": "loha", "use_dora": True}, "use_dora is for LoRA"),
        ({"adapter": "lokr", "use_rslora": True}, "use_rslora is for LoRA"),
        ({"adapter": "loha", "lora_dropout": 0.1}, "lora_dropout is for LoRA"),
        ({"lokr_factor": 4}, "lokr_factor is for LoKr"),
        ({"conv_alpha": 2.0}, "set conv_rank too"),
        ({"text_encoder_learning_rate": 1e-5}, "text encoders are not trained"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunSpec.model_validate({"base": {"model": "m", **base}, "dataset": {"path": "d"}})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"rank": 9}, [("E2333", "base.rank")]),
        ({"conv_rank": 9}, [("E2333", "base.conv_rank")]),
        ({"rank": 9, "adapter": "lokr", "lora_dropout": 0.0}, []),
        ({"targets": ["to_x"]}, [("E2333", "base.targets")]),
        ({"initial_adapter": "/none/a.safetensors"}, [("E2331", "base.initial_adapter")]),
        ({"merged_adapters": [{"path": "/none/a.pt"}]}, [("E2332", "base.merged_adapters[0].path")]),
    ],
)
def test_a_local_model_is_asked_whether_an_adapter_fits(
    world: Path, keys: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    spec = tiny_spec(world / "base", world / "images", base=keys)
    assert [(problem.code, problem.where) for problem in adapter_problems([spec])] == expected


def test_the_largest_rank_that_works_is_named(world: Path) -> None:
    base = tiny_spec(world / "base", world / "images", base={"rank": 64, "conv_rank": 64}).base
    shapes = {"a.to_q": (32, 24), "b.to_q": (16, 64), "c.conv1": (40, 2, 3, 3)}
    assert misfit(base, shapes, ("to_q", "conv1")) == (
        "rank",
        "64 is above the size of b.to_q, 16",
        "the largest rank that works with this model and these targets is 16",
    )
    assert misfit(base, shapes, ("conv1",)) == (
        "conv_rank",
        "64 is above the size of c.conv1, 18",
        "the largest conv_rank that works with this model and these targets is 18",
    )


def test_an_adapter_of_another_base_is_told_by_the_width_of_its_text_states(
    world: Path, tmp_path: Path
) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, codes in ((32, []), (64, ["E2334"])):
        path = tmp_path / f"{width}.safetensors"
        write(path, {f"{module}.lora_down.weight": torch.zeros(4, width)}, {})
        spec = tiny_spec(world / "base", world / "images", base={"initial_adapter": str(path)})
        assert [problem.code for problem in adapter_problems([spec])] == codes
