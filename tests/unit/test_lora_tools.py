"""``orchestrate lora``: what a tool writes is, for programs that load it, what it promises."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.adapters import write_adapter
from support.tiny_models import build_base
from torch import Tensor

from orchestrator.cli import main
from trainer.__main__ import main as trainer
from trainer.config import Base
from trainer.errors import BadInput
from trainer.export.modules import adapted_modules
from trainer.export.reading import read_onto_base
from trainer.families import load_family
from trainer.methods.module_names import known_names, sgm_names
from trainer.methods.targets import networks
from trainer.tensor_file import write
from trainer.weights.combining import Ranks, mixed, read_weighted, relative_error, resized
from trainer.weights.extracting import extract
from trainer.weights.inspecting import in_lines, inspect
from trainer.weights.lora_file import read_lora
from trainer.weights.merging import merge
from trainer.weights.names import module_of
from trainer.weights.writing import convert, write_lora

LOCON = {"rank": 4, "alpha": 2.0, "conv_rank": 3, "conv_alpha": 1.0, "targets": "linear"}
KINDS: dict[str, dict[str, Any]] = {
    "locon": {**LOCON, "train_text_encoder": True},
    "rslora": {"rank": 4, "alpha": 2.0, "use_rslora": True},
    "dora": {**LOCON, "use_dora": True, "train_text_encoder": True},
    "loha": {**LOCON, "adapter": "loha"},
    "lokr": {"adapter": "lokr", "rank": 2, "alpha": 1.0, "targets": "linear"},
}


Made = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Mapping[str, Path]:
    return {"sd1": built / "base", "sdxl": build_base(tmp_path_factory.mktemp("xl"), "sdxl")}


@pytest.fixture(scope="module")
def made(models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Gives the adapter of a kind for a family, as a checkpoint has it."""
    root = tmp_path_factory.mktemp("adapters")

    def make(family: str, kind: str) -> Path:
        file = root / f"{family}-{kind}.safetensors"
        return file if file.exists() else write_adapter(models[family], file, **KINDS[kind])

    return make


def changes(file: Path) -> dict[tuple[str, str], Tensor]:
    return {(m.network, m.name): m.change_OI() for m in read_lora(file).modules}


def weights(model: Path) -> dict[str, Tensor]:
    """The numbers in a diffusers folder, by the names of adapters' modules."""
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    return {
        f"{network}.{key.removeprefix('text_model.')}": tensor
        for network, name in files.items()
        for key, tensor in load_file(model / network / f"{name}.safetensors").items()
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_module_is_found_again_by_every_name(models: Mapping[str, Path], family: str) -> None:
    roots = networks(load_family(Base(model=str(models[family]))))
    table = known_names(roots)
    assert len(table) > 500
    for called, module in table.items():
        assert module_of(called) == module, called
    assert len(sgm_names([n for n, _ in roots["unet"].named_modules()], 2)) > 90


def test_every_layer_of_sd3_has_a_name_that_is_known(tmp_path: Path) -> None:
    roots = networks(load_family(Base(model=str(build_base(tmp_path, "sd3")))))
    odd = ("lora_", "text_encoder_3.text_model")  # nobody writes these
    names = [called for called in known_names(roots) if not called.startswith(odd)]
    assert {called.partition(".")[0] for called in names} == roots.keys()
    assert [called for called in names if module_of(called) is None] == []


@pytest.mark.parametrize(
    "called",
    [
        "unet.banana",
        "unet.down_blocks.banana",
        "unet.down_blocks.0.motion_modules.0.proj_in",
        "unet.down_blocks.0.attentions.0.add_k_proj",
        "unet.transformer_blocks.0.attn.to_q",
        "unet.",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.0.mlp.banana",
        "vae.encoder.conv_in",
        "lora_unet_single_blocks_0_linear1",
        "lora_unet_text_model_encoder_layers_0_mlp_fc1",
        "lora_unet_to_q_",
        "lora_te_down_blocks_0_attentions_0_proj_in",
        "lora_te1_",
    ],
)
def test_a_name_of_no_known_family_is_none(called: str) -> None:
    assert module_of(called) is None


@pytest.mark.parametrize(("family", "kind"), [*(("sd1", kind) for kind in KINDS), ("sdxl", "locon")])
def test_forms_round_trip_without_any_error(made: Made, tmp_path: Path, family: str, kind: str) -> None:
    ours = made(family, kind)
    through: list[Any] = ["kohya"] if kind in ("loha", "lokr") else ["kohya", "diffusers"]
    file = ours
    for form in (*through, *reversed(through)):
        file = convert(file, tmp_path / f"{file.stem}-{form}.safetensors", form)
        assert read_lora(file).form == form
    first, last = read_lora(ours), read_lora(file)
    assert first.family == last.family
    assert [(m.network, m.name, m.rank) for m in first.modules] == [
        (m.network, m.name, m.rank) for m in last.modules
    ]
    for before, after in zip(first.modules, last.modules, strict=True):
        assert torch.equal(before.change_OI(), after.change_OI())
        assert before.tensors.keys() == after.tensors.keys()
        if before.magnitude is not None and after.magnitude is not None:
            assert torch.equal(before.magnitude, after.magnitude)
    if kind != "lokr":
        back = convert(file, tmp_path / "back.safetensors", "ours")
        expected, found = load_file(ours), load_file(back)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(("family", "form"), [("sdxl", "kohya"), ("sd1", "diffusers")])
def test_diffusers_reads_what_was_converted(
    models: Mapping[str, Path], made: Made, tmp_path: Path, family: str, form: Any
) -> None:
    ours = made(family, "locon")
    file = convert(ours, tmp_path / "other.safetensors", form)
    read, name = read_onto_base(file, Base(model=str(models[family])))
    on_base = {(m.network, m.name): m for m in adapted_modules(networks(read), name)}
    expected = changes(ours)
    assert on_base.keys() == expected.keys()
    for place, change in expected.items():
        assert torch.allclose(on_base[place].change_OI(), change, rtol=1e-6, atol=1e-8), place


def test_a_folded_file_needs_no_header(made: Made, tmp_path: Path) -> None:
    ours = made("sd1", "locon")
    folded = convert(ours, tmp_path / "folded.safetensors", "diffusers", fold=True)
    write(tmp_path / "bare.safetensors", load_file(folded), {})
    expected = changes(ours)
    for place, change in changes(tmp_path / "bare.safetensors").items():
        assert torch.allclose(change, expected[place], rtol=1e-6, atol=1e-9)


def test_inspect_says_what_is_there(made: Made, tmp_path: Path) -> None:
    found = inspect(convert(made("sd1", "dora"), tmp_path / "k.safetensors", "kohya", dtype="bf16"))
    assert (found["form"], found["family"], found["kind"], found["dtype"]) == (
        "kohya",
        None,
        "dora",
        "bfloat16",
    )
    assert set(found["networks"]) == {"unet", "text_encoder"}
    assert found["networks"]["unet"]["ranks"].keys() == {"4", "3"}
    assert found["networks"]["unet"]["alphas"].keys() == {"2", "1"}
    assert "to_out.0" in found["networks"]["unet"]["trained"]
    assert found["modules"]["unet.mid_block.resnets.0.conv1"] == {"rank": 3, "alpha": 1.0}
    assert any("rank 4" in line for line in in_lines(found, keys=True))


def test_a_mix_is_the_weighted_sum(models: Mapping[str, Path], made: Made, tmp_path: Path) -> None:
    a = made("sd1", "locon")
    b = write_adapter(models["sd1"], tmp_path / "b.safetensors", seed=2, rank=2, alpha=6.0)
    b = convert(b, tmp_path / "b-kohya.safetensors", "kohya")
    exact = mixed([read_weighted(f"{a}:0.7"), read_weighted(f"{b}:-0.4")])
    file = write_lora(exact, tmp_path / "mix.safetensors", "kohya")
    one, other, sum_ = changes(a), changes(b), changes(file)
    assert sum_.keys() == one.keys() | other.keys()
    for place, change in sum_.items():
        expected = 0.7 * one.get(place, torch.zeros(())) - 0.4 * other.get(place, torch.zeros(()))
        assert torch.allclose(change, expected, rtol=1e-4, atol=1e-6), place
    smaller = resized(exact, Ranks(rank=5))
    assert max(m.rank for m in smaller.modules) == 5
    assert 0 < relative_error(exact, smaller) < 0.5


def test_resizing_reaches_the_least_error_there_is(made: Made, tmp_path: Path) -> None:
    lora = read_lora(made("sd1", "locon"))
    smaller = resized(lora, Ranks(rank=2))
    missed = total = 0.0
    for before, after in zip(lora.modules, smaller.modules, strict=True):
        squares = torch.linalg.svdvals(before.change_OI().double()).square()
        error = (before.change_OI().double() - after.change_OI().double()).square().sum()
        assert error.sqrt() == pytest.approx(squares[2:].sum().sqrt().item(), rel=1e-4)
        missed, total = missed + squares[2:].sum().item(), total + squares.sum().item()
    assert relative_error(lora, smaller) == pytest.approx((missed / total) ** 0.5, rel=1e-4)
    for ranks in (Ranks(ratio=0.5), Ranks(cumulative=0.6), Ranks(frobenius=0.8, rank=6)):
        found = resized(lora, ranks)
        assert len({m.rank for m in found.modules}) > 1
        assert all(m.scale == 1.0 for m in found.modules)
    again = read_lora(write_lora(found, tmp_path / "dynamic.safetensors", "diffusers"))
    assert [m.rank for m in again.modules] == [m.rank for m in found.modules]
    assert [m.scale for m in again.modules] == [1.0] * len(found.modules)


def test_a_merged_base_is_the_base_with_its_adapters(
    models: Mapping[str, Path], made: Made, tmp_path: Path
) -> None:
    ours = made("sd1", "locon")
    kohya = convert(ours, tmp_path / "k.safetensors", "kohya")
    merged = merge(str(models["sd1"]), [f"{kohya}:0.5"], tmp_path / "merged")
    before, after = weights(models["sd1"]), weights(merged)
    expected = {f"{n}.{m}.weight": 0.5 * change for (n, m), change in changes(ours).items()}
    for key, weight in after.items():
        change = expected.get(key, torch.zeros(())).reshape(weight.shape if key in expected else ())
        assert torch.allclose(weight, before[key] + change, rtol=1e-5, atol=1e-6), key
    with pytest.raises(BadInput, match="is there already"):
        merge(str(models["sd1"]), [str(kohya)], merged)
    with pytest.raises(BadInput, match="is the base itself"):
        merge(str(merged), [str(kohya)], merged, force=True)
    xl = made("sdxl", "locon")
    with pytest.raises(BadInput, match="no module text_encoder"):
        merge(str(models["sd1"]), [str(xl)], merged, force=True)
    assert weights(merged).keys() == after.keys()  # a refused one left what was there


def test_what_was_merged_is_extracted_again(models: Mapping[str, Path], made: Made, tmp_path: Path) -> None:
    planted, base = made("sd1", "locon"), str(models["sd1"])
    tuned = str(merge(base, [str(planted)], tmp_path / "tuned"))
    found = extract(base, tuned, Ranks(rank=4), conv_rank=3)
    assert found.error < 1e-4
    assert found.left_out == ()
    expected, got = changes(planted), changes(write_lora(found.lora, tmp_path / "a.safetensors", "kohya"))
    assert got.keys() == expected.keys()
    for place, change in expected.items():
        assert torch.allclose(got[place], change, atol=1e-4 * float(change.abs().max())), place
    with pytest.raises(BadInput, match="have the same linear layers"):
        extract(tuned, tuned, Ranks(ratio=0.5))
    with pytest.raises(BadInput, match=r"only .*xl.* has a text_encoder_2"):
        extract(base, str(models["sdxl"]), Ranks(rank=1))


UNET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def flux(module: str) -> dict[str, Tensor]:
    called = f"transformer.{module}"
    return {f"{called}.lora_A.weight": torch.ones(2, 3072), f"{called}.lora_B.weight": torch.ones(3072, 2)}


def pair(rank: int = 2, other: int | None = None) -> dict[str, Tensor]:
    return {
        f"{UNET}.lora_down.weight": torch.ones(rank, 6),
        f"{UNET}.lora_up.weight": torch.ones(5, other or rank),
        f"{UNET}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({UNET + ".lora_down.weight": torch.ones(2, 6)}, "attn1.to_q there is only lora_A.weight"),
        (pair(2, 3), r"attn1.to_q: lora_B.weight of shape \[5, 3\] does not fit"),
        ({**pair(), f"{UNET}.lora_up.weight": torch.full((5, 2), torch.nan)}, "lora_up.weight holds NaN"),
        ({**pair(), f"{UNET}.alpha": torch.tensor(torch.inf)}, "to_q.alpha holds NaN or infinity"),
        ({**pair(), f"{UNET}.alpha": torch.ones(3)}, "alpha of unet.mid_block.*expected one number"),
        ({**pair(), f"{UNET}.dora_scale": torch.ones(4, 1)}, "5 outputs and 4 magnitudes"),
        ({**pair(), f"{UNET}.lora_up.weight": torch.ones(5, 2, 3, 3)}, "expected a kernel of 1"),
        (
            {**pair(), f"{UNET}.alpha": torch.tensor(1.0, dtype=torch.float8_e4m3fn)},
            "to_q.alpha is of the type float8_e4m3fn, expected float16",
        ),
        (
            {**pair(), f"{UNET}.lora_up.weight": torch.ones(5, 2, dtype=torch.int8)},
            "lora_up.weight is of the type int8, expected float16",
        ),
        (
            {**pair(), f"{DOTTED}.lora_B.weight": torch.zeros(5, 2)},
            f"{DOTTED}.lora_B.weight is the same part|the same part of the same module as {DOTTED}",
        ),
        (
            {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(2, 2)},
            "of FLUX, .*double_blocks_0",
        ),
        (
            flux("single_transformer_blocks.0.attn.to_q"),
            "of FLUX, which is not supported: it has transformer.single",
        ),
        (
            flux("transformer_blocks.0.attn.to_q"),
            "of FLUX, which is not supported: .*to_q reads 3072 numbers",
        ),
        ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "out.2.weight belongs to no kind of adapter"),
        ({}, "is empty"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused_by_its_key(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(BadInput, match=message):
        read_lora(tmp_path / "bad.safetensors")


def test_an_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {**pair(), f"{UNET}.alpha": torch.tensor(4)}, {})
    assert read_lora(tmp_path / "a.safetensors").modules[0].scale == 2.0


def test_a_damaged_file_and_a_lying_header_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {f"{DOTTED}.lora_A.weight": torch.ones(2, 6), f"{DOTTED}.lora_B.weight": torch.ones(5, 2)}
    for told, message in (
        ({"unet.r": 4, "unet.lora_alpha": 4}, "to_q has rank 2, its header says 4"),
        ({"unet.lora_alpha": 4}, "lora_adapter_metadata: r: Field required"),
    ):
        write(file, tensors, {"lora_adapter_metadata": json.dumps(told)})
        with pytest.raises(BadInput, match=message):
            read_lora(file)
    write(file, tensors, {})
    half = tmp_path / "half.safetensors"
    half.write_bytes(file.read_bytes()[:-8])
    many, short = tmp_path / "many.safetensors", tmp_path / "short.safetensors"
    for file, entry in ((many, f'"{UNET}_%d.alpha":{{"dtype":"F32",'), (short, '"%d":{')):
        header = ",".join(entry % n + '"data_offsets":[0,0]}' for n in range(200_000)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
    text = tmp_path / "text.safetensors"
    text.write_text("a list of words, renamed\n" * 9)
    for path, message in (
        (half, "half.safetensors is cut off or no .safetensors file"),
        (text, "text.safetensors is cut off or no .safetensors file"),
        (many, rf"^adapter {many}: its header has .* the first {UNET}_0.alpha: write fewer"),
        (short, rf"^adapter {short}: 200000 tensors, at most 20000, the first 0: write fewer"),
        (tmp_path / "none.safetensors", "none.safetensors cannot be read: No such file"),
        (tmp_path / "old.ckpt", "old.ckpt: only .safetensors files are read"),
    ):
        with pytest.raises(BadInput, match=message):
            read_lora(path)


def test_what_no_product_holds_is_neither_mixed_nor_resized(tmp_path: Path) -> None:
    dora, plain, wide = (tmp_path / f"{name}.safetensors" for name in ("dora", "plain", "wide"))
    write(dora, {**pair(), f"{UNET}.dora_scale": torch.ones(5, 1)}, {})
    write(plain, pair(), {"ss_base_model_version": "sd_v1"})
    write(wide, {**pair(), f"{UNET}.lora_down.weight": torch.ones(2, 8)}, {})
    with pytest.raises(BadInput, match="to_q has DoRA's magnitudes"):
        resized(read_lora(dora), Ranks(rank=1))
    with pytest.raises(BadInput, match="to_q: changes of layers of the shapes"):
        mixed([(read_lora(plain), 1.0), (read_lora(wide), 1.0)])
    write(wide, pair(), {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(BadInput, match=r"is of sd1, .* of sdxl"):
        mixed([(read_lora(plain), 1.0), (read_lora(wide), 1.0)])
    huge = {
        f"{UNET}.lora_down.weight": torch.full((2, 6), 3e38),
        f"{UNET}.lora_up.weight": torch.full((5, 2), 3e38),
    }
    write(wide, huge, {})
    with pytest.raises(BadInput, match="to_q has numbers too large"):
        resized(read_lora(wide), Ranks(rank=1))
    with pytest.raises(BadInput, match="the weight much is no number"):
        read_weighted(f"{plain}:much")


def test_the_command_line_overwrites_nothing(tmp_path: Path) -> None:
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (file, out):
        write(path, pair(), {"ss_base_model_version": "sd_v1"})
    run = CliRunner().invoke

    before = out.read_bytes()
    refused = run(main, ["lora", "convert", str(file), "--to", "diffusers", "--out", str(out)])
    assert (refused.exit_code, out.read_bytes()) == (2, before)
    assert "E2701" in refused.output
    direct = run(trainer, ["lora", "resize", str(file), "--rank", "1", "--out", str(out)])
    assert (direct.exit_code, out.read_bytes()) == (78, before)
    assert "is there already" in direct.output
