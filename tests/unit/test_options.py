"""The names of other programs stand for keys that there are, and the table in the docs says which."""

from pathlib import Path

import pytest

from orchestrator.grid.options import SUBJECTS, aliases, tables
from orchestrator.grid.schema import BLOCKS, NOT_YET, Grid
from orchestrator.grid.sweep import load

DOCS = Path(__file__).parents[2] / "docs" / "options.md"


def test_every_counterpart_is_a_key_and_no_alias_hides_one() -> None:
    for option in (option for subject in SUBJECTS.values() for option in subject):
        block, _, key = option.ours.partition(".")
        model = BLOCKS.get(block) or (Grid.model_fields[block].annotation if key else None)
        keys = getattr(model, "model_fields", None) or {"url", "every", "keep_last"}
        assert not option.ours or (key in keys if key else block in {*Grid.model_fields, *NOT_YET}), option
        assert option.note or option.ours, option
    taken = {name for name, (block, _) in aliases().items() if name in BLOCKS[block].model_fields}
    assert not taken, "an alias is a key of ours too"


def test_the_docs_say_what_the_program_accepts() -> None:
    assert DOCS.read_text().endswith(tables()), (
        "write it anew: see the docstring of orchestrator/grid/options.py"
    )


def test_kohya_s_names_are_accepted_in_every_block_and_place(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("""
parameters: {network_dim: {values: [4, 8]}, caption_tag_dropout_rate: {value: 0.1}}
base:
  {pretrained_model_name_or_path: owner/model, network_alpha: 2, conv_dim: 4, text_encoder_lr: 1e-5,
   train_text_encoder: true}
dataset: {train_data_dir: photos, caption_dropout_rate: 0.2, enable_bucket: true}
prior: {class_prompt: a dog, prior_loss_weight: 0.5}
""")
    spec = load(tmp_path / "grid.yaml", overrides=["flip_aug=true", "ip_noise_gamma=0.1"]).runs[1].spec

    assert (spec.base.model, spec.base.rank, spec.base.lora_alpha, spec.base.conv_rank) == (
        *("owner/model", 8, 2.0),
        4,
    )
    assert (spec.base.text_encoder_learning_rate, spec.base.input_perturbation) == (1e-5, 0.1)
    assert (spec.dataset.caption_dropout, spec.dataset.tag_dropout) == (0.2, 0.1)
    assert spec.dataset.path == str(tmp_path / "photos")
    assert spec.dataset.buckets
    assert spec.dataset.random_flip
    assert spec.prior
    assert (spec.prior.prompt, spec.prior.weight) == ("a dog", 0.5)


@pytest.mark.parametrize("block", ["base: {model: m, rank: 4, network_dim: 8}", "base: {network_dimm: 8}"])
def test_two_names_of_one_key_and_a_misspelt_alias_are_refused(block: str, tmp_path: Path) -> None:
    from orchestrator.errors import InvalidFile

    (tmp_path / "grid.yaml").write_text(
        f"parameters: {{seed: {{values: [1]}}}}\n{block}\ndataset: {{path: x}}\n"
    )
    with pytest.raises(InvalidFile, match="network_dim"):
        load(tmp_path / "grid.yaml")
