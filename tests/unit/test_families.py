"""Each family says and predicts what diffusers' pipeline does, trains, resumes exactly, loads from a file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.single_file import write_single_file
from support.single_file_sd3 import write_sd3_file
from support.tiny_world import build_base, tiny_spec
from support.training import Lay, contents, interrupted, newest

import trainer
from trainer.attempt import prepare
from trainer.config import Base
from trainer.config.families import DENOISERS, FAMILIES, FLOW_MATCHING
from trainer.errors import BadInput
from trainer.families import Family, family_class, load_family
from trainer.families.source import load_pipeline
from trainer.methods import attach
from trainer.sample import draw_images
from trainer.stop import Stop
from trainer.texts import LiveTexts

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DRAWN = ("sd2", "sdxl", "sd3", "sd3-without-t5")
PROMPT = "a photo of a dog, in Zürich"

Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny base model of each family, built once."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str, **different: Any) -> Path:
        folder = root / "-".join([family, *map(str, different.values())])
        return folder if folder.exists() else build_base(folder, family, **different)

    return make


def loaded(folder: Path, **keys: Any) -> Family:
    return load_family(Base(model=str(folder), **keys))


def inputs(family: Family, count: int = 2) -> tuple[Any, ...]:
    """Noisy latents, timesteps and conditioning for one forward pass."""
    noisy = torch.randn((count, family.latent_channels, 4, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = family.encode_tokens([family.token_ids(PROMPT)] * count)
    sizes = torch.tensor([[40.0, 30.0, 8.0, 0.0, 32.0, 32.0]] * count)
    return noisy, torch.tensor([17, 803]), said | family.size_conditioning(sizes)


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_gives_the_image_that_diffusers_gives(name: str, model: Model, tmp_path: Path) -> None:
    samples = {"prompts": [PROMPT], "seeds": [5], "steps": 3, "cfg": 4.0}
    spec = tiny_spec(model(name), tmp_path, samples=samples)
    family = loaded(model(name))
    (ours,) = draw_images(family, spec, LiveTexts(family), Stop())

    pipeline = load_pipeline(spec.base)
    pipeline.scheduler = family.sampling_schedule()
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        PROMPT,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    ).images

    assert np.array(theirs).std() > 5
    assert np.abs(np.array(ours.image).astype(int) - np.array(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_stopped_and_resumed_equals_never_stopped(name: str, model: Model, world: Path, lay: Lay) -> None:
    keys = {"max_train_steps": 2, "gradient_accumulation_steps": 1}
    data = {"random_flip": False, "center_crop": True, "val_fraction": 0.0}
    spec = tiny_spec(model(name), world / "images", base=keys, dataset=data)
    straight, _, second = interrupted(lay, spec, 1)

    assert contents(newest(second)) == contents(newest(straight))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_an_adapter_changes_nothing_at_first_and_its_gradient_is_the_same_recomputed(
    name: str, model: Model
) -> None:
    gradients = []
    for keys in ({}, {"gradient_checkpointing": True}):
        base = Base(model=str(model(name)), rank=2, targets="linear", **keys)
        family = load_family(base)
        noisy, timesteps, conditioning = inputs(family)
        with torch.no_grad():
            bare = family.predict(noisy, timesteps, conditioning)
        methods = attach(base, family)
        methods.use()
        family.denoiser.train()
        predicted = family.predict(noisy, timesteps, conditioning)
        assert torch.equal(predicted, bare)
        predicted.square().mean().backward()
        gradients.append({name: p.grad for name, p in methods.parameters.items()})

    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert any(bool(g.any()) for key, g in gradients[0].items() if ".lora_B." in key)


def test_sdxl_says_what_diffusers_says(model: Model) -> None:
    family, pipeline = loaded(model("sdxl")), load_pipeline(Base(model=str(model("sdxl"))))
    ours = family.encode_tokens([family.token_ids(text) for text in (PROMPT, "")])
    said, nothing, pooled, nothing_pooled = pipeline.encode_prompt(PROMPT)

    for got, expected in ((ours["states"], [said, nothing]), (ours["pooled"], [pooled, nothing_pooled])):
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert not ours["states"][1].any()


def test_sdxl_encodes_the_empty_text_if_the_model_does_not_say_zeros(model: Model, tmp_path: Path) -> None:
    base = shutil.copytree(model("sdxl"), tmp_path / "base")
    index = base / "model_index.json"
    index.write_text(
        index.read_text().replace(
            '"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false'
        )
    )
    family, pipeline = loaded(base), load_pipeline(Base(model=str(base)))
    ours = family.encode_tokens([family.token_ids("")])

    torch.testing.assert_close(ours["states"], pipeline.encode_prompt(PROMPT)[1], rtol=1e-5, atol=1e-6)
    assert family.text_identity() != loaded(model("sdxl")).text_identity()


def test_sdxl_is_told_the_true_sizes_in_the_order_of_diffusers(model: Model, world: Path, lay: Lay) -> None:
    """Images of 40x32 pixels, of which a square of 32 is cut, some of them mirrored."""
    data = {"caption_dropout": 0.0, "random_flip": True, "center_crop": False}
    keys = {"train_batch_size": 5, "gradient_accumulation_steps": 2}
    parts = prepare(lay("run", tiny_spec(model("sdxl"), world / "images", base=keys, dataset=data)), Stop())
    pipeline = load_pipeline(parts.spec.base)

    crops = set()
    for batch in parts.training.batches(0, 10):
        told = parts.family.size_conditioning(batch.sizes_B6)["time_ids"]
        for row in told:
            original, corner, target = (tuple(int(n) for n in row[k : k + 2]) for k in (0, 2, 4))
            theirs = pipeline._get_add_time_ids(
                original, corner, target, dtype=torch.float32, text_encoder_projection_dim=48
            )
            assert torch.equal(row, theirs[0])
            assert (original, target) == ((32, 40), (32, 32))
            crops.add(corner)
    assert crops == {(0, 0), (0, 8)}


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "sd3-without-t5"])
def test_a_single_file_is_the_same_model_as_its_folder(name: str, model: Model, tmp_path: Path) -> None:
    write = write_sd3_file if name.startswith("sd3") else write_single_file
    file = write(model(name), tmp_path / "model.safetensors")
    config = model("sd3") if name == "sd3-without-t5" else model(name)  # the hub's names T5
    shutil.copytree(config, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))

    single, folder = loaded(file), loaded(model(name))

    assert single.name == folder.name == name.removesuffix("-without-t5")
    assert single.token_ids(PROMPT) == folder.token_ids(PROMPT)
    assert single.text_identity() == folder.text_identity()
    assert single.image_identity() == folder.image_identity()
    weights, expected = single.denoiser.state_dict(), folder.denoiser.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("tensor", "shape", "said"),
    [
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", [1], "kind xl_refiner"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", [1], "kind flux-schnell"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", [1], "an adapter is no base model"),
    ],
)
def test_a_single_file_that_cannot_be_trained_is_named(
    tensor: str, shape: list[int], said: str, tmp_path: Path
) -> None:
    save_file({tensor: torch.zeros(shape)}, tmp_path / "model.safetensors")

    with pytest.raises(BadInput) as caught:
        loaded(tmp_path / "model.safetensors")

    assert said in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("keys", "data", "said"),
    [
        ({"resolution": 40}, {}, "base.resolution 40 is not a multiple of 16"),
        ({"resolution": 32}, {"buckets": True, "bucket_min": 24, "bucket_step": 8}, "bucket_step 8 is not"),
    ],
)
def test_a_size_that_a_transformer_cannot_cut_into_pieces_is_refused(
    keys: dict[str, Any], data: dict[str, Any], said: str, model: Model, world: Path, lay: Lay
) -> None:
    with pytest.raises(BadInput, match=said):
        prepare(lay("run", tiny_spec(model("sd3"), world / "images", base=keys, dataset=data)), Stop())


def test_a_single_file_that_lacks_a_tensor_is_refused(model: Model, tmp_path: Path) -> None:
    file = write_single_file(model("sd2"), tmp_path / "model.safetensors")
    shutil.copytree(model("sd2"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, file)

    with pytest.raises(BadInput, match="lacks weights that its family has"):
        loaded(file)


def test_clip_skip_reads_an_earlier_layer(model: Model) -> None:
    family, pipeline = loaded(model("sd1"), clip_skip=2), load_pipeline(Base(model=str(model("sd1"))))
    encoder = pipeline.text_encoder
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    del layers[-1]

    with torch.no_grad():
        expected = encoder(torch.tensor(family.token_ids(PROMPT)))[0]
        torch.testing.assert_close(family.encode_tokens([family.token_ids(PROMPT)])["states"], expected)
    assert family.text_identity() != loaded(model("sd1")).text_identity()


def test_zero_terminal_snr_begins_in_pure_noise(model: Model) -> None:
    family = loaded(model("sd2"), zero_terminal_snr=True)
    schedule = family.sampling_schedule()
    schedule.set_timesteps(3)

    assert float(family.process.alpha_bar_T[-1]) == 0.0
    assert float(loaded(model("sd2")).process.alpha_bar_T[-1]) > 1e-3
    assert int(schedule.timesteps[0]) == 999
    noise, timesteps = torch.randn(1, 4, 2, 2), torch.tensor([999])
    assert torch.equal(family.process.add_noise(torch.ones(1, 4, 2, 2), noise, timesteps), noise)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("sd2", {"prediction_type": "epsilon"}, "says of itself that it predicts v_prediction"),
        ("sd1", {"zero_terminal_snr": True}, "take a model with v-prediction"),
        ("sd1", {"clip_skip": 3}, "has 2 layers"),
        ("sdxl", {"clip_skip": 2}, "leave clip_skip out"),
        ("sd3", {"zero_terminal_snr": True}, "leave zero_terminal_snr out"),
    ],
)
def test_what_a_model_does_not_do_is_refused(
    name: str, keys: dict[str, Any], said: str, model: Model
) -> None:
    with pytest.raises(BadInput) as caught:
        loaded(model(name), **keys)
    assert said in f"{caught.value} {caught.value.hint}"


def test_zero_terminal_snr_with_another_prediction_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs v-prediction, but"):
        tiny_spec(tmp_path, tmp_path, base={"zero_terminal_snr": True, "prediction_type": "epsilon"})


def test_a_single_files_kind_of_prediction_is_the_runs_to_say(model: Model, tmp_path: Path) -> None:
    file = write_single_file(model("sd2"), tmp_path / "model.safetensors")
    shutil.copytree(model("sd2"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))

    family = loaded(file, prediction_type="epsilon")

    assert family.process.prediction_type == "epsilon"
    assert family.sampling_schedule().config.prediction_type == "epsilon"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
def test_layout_and_compilation_rename_nothing(model: Model) -> None:
    plain, arranged = loaded(model("sdxl")), loaded(model("sdxl"), channels_last=True, compile=True)

    assert arranged.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()
    weight = arranged.denoiser.get_parameter("down_blocks.0.resnets.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    blocks = [m for m in arranged.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_half_precision_and_channels_last_predict_nearly_the_same(name: str, model: Model) -> None:
    predicted = []
    for keys in ({}, {"mixed_precision": "bf16", "channels_last": True}):
        family = loaded(model(name), **keys)
        with torch.no_grad():
            predicted.append(family.predict(*inputs(family)))

    assert predicted[1].dtype == torch.float32
    torch.testing.assert_close(predicted[1], predicted[0], rtol=0.1, atol=0.1 * float(predicted[0].std()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own compiler
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3"])
def test_compiled_blocks_predict_and_learn_as_the_plain_ones(name: str, precision: str, model: Model) -> None:
    found = []
    for keys in ({}, {"compile": True, "channels_last": True}):
        base = Base(model=str(model(name)), mixed_precision=precision, rank=4, targets="linear", **keys)
        family = load_family(base)
        noisy, timesteps, conditioning = (
            {key: part.to(family.device) for key, part in given.items()}
            if isinstance(given, dict)
            else given.to(family.device)
            for given in inputs(family)
        )
        methods = attach(base, family)
        methods.use()
        family.denoiser.train()
        predicted = family.predict(noisy, timesteps, conditioning)
        predicted.square().mean().backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in methods.parameters.values() if p.grad is not None]
        )
        found.append((predicted.detach(), norm, list(methods.parameters)))

    (plain, plain_norm, names), (compiled, norm, compiled_names) = found
    rough = 1e-3 if precision == "no" else 0.1
    assert compiled_names == names
    torch.testing.assert_close(compiled, plain, rtol=rough, atol=rough * float(plain.std()))
    torch.testing.assert_close(norm, plain_norm, rtol=rough, atol=0.0)


def test_encoders_are_freed_and_images_can_still_be_decoded(model: Model) -> None:
    family = loaded(model("sdxl"))
    latents = family.encode_image(torch.zeros(3, 32, 32)).mean_CHW

    family.rest_vae()
    family.rest_text_encoders()
    assert list(family.text_encoders) == ["text_encoder", "text_encoder_2"]
    family.free_text_encoders()
    assert not family.text_encoders
    assert family.decode(latents).shape == (3, 32, 32)


def test_a_network_comes_to_the_device_when_it_is_used_and_no_sooner(model: Model) -> None:
    """On a device that has room for shapes only, so that what it computes cannot be read."""
    base = Base(model=str(model("sdxl")))
    family: Any = family_class("sdxl")(load_pipeline(base), base, torch.device("meta"))
    networks = {"denoiser": family.denoiser, "VAE": family._vae, **family.text_encoders}

    def there() -> set[str]:
        return {name for name, network in networks.items() if all(p.is_meta for p in network.parameters())}

    assert there() == set()
    told = family.encode_tokens([family.token_ids(PROMPT)])
    assert there() == {"text_encoder", "text_encoder_2"}
    with pytest.raises(NotImplementedError, match="meta"):
        family.encode_image(torch.zeros(3, 32, 32))
    assert there() == {"text_encoder", "text_encoder_2", "VAE"}
    told |= family.size_conditioning(torch.zeros(1, 6, device="meta"))
    noisy = torch.zeros(1, family.latent_channels, 4, 4, device="meta")
    family.predict(noisy, torch.ones(1, dtype=torch.long, device="meta"), told)
    assert there() == set(networks)


def test_gradients_flow_into_text_encoders_that_ask_for_them(model: Model) -> None:
    for name in ("sd2", "sdxl", "sd3"):
        family = loaded(model(name))
        for encoder in family.text_encoders.values():
            encoder.requires_grad_(True)
        said = family.encode_tokens([family.token_ids(PROMPT)])
        sum(part.square().mean() for part in said.values()).backward()
        for encoder in family.text_encoders.values():
            gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
            assert any(bool(gradient.any()) for gradient in gradients)


def test_a_family_is_one_file_and_its_registration() -> None:
    """Of all that trains, only its own module and the registry know of Stable Diffusion 3; exports and
    ``generate`` know names and sizes that others have for it."""
    root = Path(trainer.__file__).parent
    named = {
        path.relative_to(root).as_posix()
        for folder in ("families", "objective", "methods", "config", "")
        for path in (root / folder).glob("*.py")
        if any(word in path.read_text() for word in ("StableDiffusion3", "import sd3", '"sd3"'))
    }
    assert named - {"generate.py"} == {"families/sd3.py", "config/families.py"}


def test_the_registry_names_pipelines_and_families_that_are_there() -> None:
    for pipeline, names in FAMILIES.items():
        assert hasattr(diffusers, pipeline)
        for name in names:
            family = family_class(name)
            assert family.name == name
            assert family.denoiser_prefix == DENOISERS.get(pipeline, "unet")
            assert (family.__module__, pipeline in FLOW_MATCHING) in {
                (f"trainer.families.{name}", name == "sd3")
            }
