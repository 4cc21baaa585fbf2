"""Every preset is a sweep file without mistakes, and says what the recipe says that it is named after."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.commands.starting import presets
from orchestrator.grid.sweep import validate
from trainer.config import RunSpec


def written(preset: str, folder: Path) -> list[RunSpec]:
    """What ``init`` writes, and ``validate`` accepts."""
    made = CliRunner().invoke(main, ["init", "--preset", preset, str(folder)])
    assert made.exit_code == 0, made.output
    checked = CliRunner().invoke(main, ["validate", str(folder / "grid.yaml")])
    assert checked.exit_code == 0, checked.output
    again = CliRunner().invoke(main, ["init", "--preset", preset, str(folder)])
    assert again.exit_code == 2
    assert "E2704" in again.output
    return [spec for _, spec in validate(folder / "grid.yaml").cells]


@pytest.mark.parametrize("preset", presets())
def test_init_writes_a_file_without_mistakes(preset: str, tmp_path: Path) -> None:
    specs = written(preset, tmp_path / "new")

    assert specs
    assert preset != "tiny" or Path(specs[0].base.model, "model_index.json").exists()


def test_the_blog_s_command_option_by_option(tmp_path: Path) -> None:
    (spec,) = written("huggingface-blog", tmp_path / "new")
    base = spec.base

    assert (base.resolution, base.train_batch_size, base.gradient_accumulation_steps) == (512, 1, 4)
    assert (base.max_train_steps, base.learning_rate, base.max_grad_norm) == (15000, 1e-4, 1.0)
    assert (base.lr_scheduler, base.lr_warmup_steps, base.seed) == ("cosine", 0, 1337)
    assert (base.rank, base.lora_alpha, base.targets, base.mixed_precision) == (4, 4.0, "attention", "fp16")
    assert (base.optimizer, base.adam_beta1, base.adam_epsilon) == ("adamw", 0.9, 1e-8)
    assert base.weight_decay == 1e-2
    assert spec.dataset.random_flip
    assert spec.dataset.center_crop
    assert spec.samples
    assert spec.samples.prompts == ("Totoro",)
    assert validate(tmp_path / "new" / "grid.yaml").grid.checkpoint.every == 500


def test_the_recipes_of_salad_and_of_draw_things(tmp_path: Path) -> None:
    (salad,) = written("salad-dreambooth-sdxl", tmp_path / "salad")
    draw_things = written("draw-things", tmp_path / "draw")

    assert (salad.base.max_train_steps, salad.base.rank, salad.base.resolution) == (500, 4, 1024)
    assert validate(tmp_path / "salad" / "grid.yaml").grid.checkpoint.every == 50
    assert [spec.base.learning_rate for spec in draw_things] == [1e-4, 1e-3]
    base = draw_things[0].base
    assert (base.rank, base.conv_rank, base.targets, base.train_text_encoder) == (8, 8, "linear", False)
    assert (base.adam_beta1, base.adam_beta2, base.adam_epsilon, base.weight_decay) == (
        0.9,
        0.999,
        1e-8,
        1e-3,
    )
