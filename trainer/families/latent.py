"""What all families of latent models share: frozen networks, their precision and layout, a VAE, tokenizers.

Text and images are encoded in fp32 whatever the training precision, so their caches are shared by all runs;
the denoiser is kept in the precision asked for and runs under autocast. Each network comes to the device when
it is first used: the peak of a run is not the sum of all.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..cache import tensors_digest
from ..config import Base
from ..config.control import Control
from ..errors import BadInput
from ..randomness import own_memory
from . import Conditioning, Posterior
from .hollow import Cut
from .new_rows import without_new_rows
from .new_words import NewWords
from .quantized import quantize

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_READ_BY_CLIP = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")


class LatentFamily(ABC):
    """See ``Family``. A subclass says how its texts are encoded and what its denoiser is called with."""

    name: str
    denoiser_prefix: str
    targets: Mapping[str, tuple[str, ...]]
    skips_layers: ClassVar[bool] = False
    """Whether ``clip_skip`` means something."""
    takes_words: ClassVar[bool] = False
    hollows: ClassVar[bool] = False
    """Whether the denoiser can do without its deepest layers."""
    cut: Cut | None = None

    def __init__(self, pipeline: Any, base: Base, device: torch.device) -> None:
        """
        Raises:
            BadInput: The model is not what its class promises, or ``base`` asks for what it cannot do.
        """
        self._check(pipeline, base)
        self.device = device
        self._dtype = DTYPES[base.mixed_precision]
        self._clip_skip = base.clip_skip
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        self.tokenizers = [parts[name] for name in sorted(parts) if name.startswith("tokenizer")]
        self.words: NewWords | None = None
        self.text_encoders: Mapping[str, nn.Module] = {
            name: frozen(parts[name]) for name in sorted(parts) if name.startswith("text_encoder")
        }
        configs = [cast(Any, encoder).config for encoder in self.text_encoders.values()]
        self._read_by_clip = [[str(getattr(each, key, None)) for key in _READ_BY_CLIP] for each in configs]
        self._vae = frozen(pipeline.vae)
        self.latent_pixels = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.side_multiple = self.latent_pixels
        self.latent_channels = int(pipeline.vae.config.latent_channels)
        self._scaling = float(pipeline.vae.config.scaling_factor)
        self._shift = float(pipeline.vae.config.shift_factor or 0.0)
        self._layout = torch.channels_last if base.channels_last else torch.contiguous_format
        if base.quantize != "none":
            quantize(parts[self.denoiser_prefix], base.quantize, device)
        kept = torch.float32 if "full" in base.train else self._dtype  # what is trained is fp32
        self.denoiser: nn.Module = frozen(parts[self.denoiser_prefix], kept)
        self._arrange(base)

    @classmethod
    def absent(cls, tensors: Container[str]) -> tuple[str, ...]:
        """Return which parts of its pipeline a single file with these tensors does without."""
        return ()

    def token_ids(self, text: str) -> list[list[int]]:
        tokenizers = self.words.tokenizers if self.words else self.tokenizers
        spelled = self.words.spelled(text) if self.words else text
        return [padded_ids(tokenizer, spelled, tokenizer.model_max_length) for tokenizer in tokenizers]

    def size_conditioning(self, sizes_B6: Tensor) -> Conditioning:
        return {}

    def encode_tokens(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        for encoder in self.text_encoders.values():
            place(encoder, self.device)
        return self._say(token_ids)

    @torch.no_grad()
    def encode_image(self, pixels_CHW: Tensor) -> Posterior:
        place(self._vae, self.device)
        posterior = self._vae.encode(pixels_CHW[None].to(self.device)).latent_dist
        mean_CHW, std_CHW = posterior.mean[0].float().cpu(), posterior.std[0].float().cpu()
        return Posterior((mean_CHW - self._shift) * self._scaling, std_CHW * self._scaling)

    @torch.no_grad()
    def decode(self, latents_CHW: Tensor) -> Tensor:
        place(self._vae, self.device)
        given_BCHW = latents_CHW[None].to(self.device) / self._scaling + self._shift
        pixels_BCHW: Tensor = self._vae.decode(given_BCHW).sample
        return pixels_BCHW[0].float().cpu()

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        place(self.denoiser, self.device)
        given_BCHW = noisy_BCHW.to(self._dtype).contiguous(memory_format=self._layout)
        with self._precision():
            return self._denoise(given_BCHW, timesteps_B, conditioning).float()

    def text_identity(self) -> str:
        weights = {
            f"{name}.{key}": tensor
            for name, encoder in self.text_encoders.items()
            for key, tensor in without_new_rows(encoder).items()
        }
        return json.dumps([self.name, self._clip_skip, self._read_by_clip, tensors_digest(weights)])

    def image_identity(self) -> str:
        return f"{self._scaling} {self._shift} {tensors_digest(self._vae.state_dict())}"

    def ready(self) -> None:
        for network in (self.denoiser, *self.text_encoders.values()):
            place(network, self.device)

    def rest_text_encoders(self) -> None:
        self._rest(*self.text_encoders.values())

    def rest_vae(self) -> None:
        self._rest(self._vae)

    def free_text_encoders(self) -> None:
        self.text_encoders = {}

    def inject(self, control: Control, hub_cache: Path | None = None) -> None:
        raise BadInput(
            f"base.control: {control.model} cannot go into a {self.name} model, which has no UNet",
            "leave control out; it is for Stable Diffusion 1, 2 and XL",
        )

    def control_conditioning(self, pixels_B3HW: Tensor) -> Conditioning:
        return {}  # what has no UNet is told nothing more

    def hidden(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Conditioning:
        return {}  # what has no UNet is told nothing more

    def _rest(self, *networks: nn.Module) -> None:
        for network in networks:
            network.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @abstractmethod
    def _say(self, token_ids: Sequence[list[list[int]]]) -> Conditioning:
        """Return what texts say; the text encoders are on the device."""

    @abstractmethod
    def _denoise(self, noisy_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the denoiser says, in the precision that it computes in."""

    def _check(self, pipeline: Any, base: Base) -> None:
        if base.clip_skip != 1 and not self.skips_layers:
            raise BadInput(
                f"base.clip_skip {base.clip_skip}: {base.model} was trained on one fixed layer of each of "
                "its text encoders",
                "leave clip_skip out; it is for Stable Diffusion 1.x and 2.x",
            )
        if base.hollow is not None and not self.hollows:
            raise BadInput(
                f"base.hollow: {base.model} has no UNet, whose deepest layers it takes out",
                "leave hollow out; gradient_checkpointing saves memory, too",
            )
        denoiser, vae = getattr(pipeline, self.denoiser_prefix).config, pipeline.vae.config
        if denoiser.in_channels != vae.latent_channels:
            raise BadInput(
                f"base model {base.model}: its denoiser has {denoiser.in_channels} input channels, its VAE "
                f"gives {vae.latent_channels}",
                "inpainting and other models that are given an image cannot be trained",
            )

    def _columns(self, token_ids: Sequence[list[list[int]]]) -> list[Tensor]:
        """Return the tokens for each encoder, (batch, length)."""
        return [torch.tensor(column, device=self.device) for column in zip(*token_ids, strict=True)]

    def _arrange(self, base: Base) -> None:
        """Lay out, checkpoint and compile the denoiser as asked. No parameter changes its name."""
        denoiser: Any = self.denoiser
        if base.channels_last:
            denoiser.to(memory_format=torch.channels_last)
        if base.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            for encoder in self.text_encoders.values():
                # transformers renamed it; both are there in between
                old = getattr(encoder, "gradient_checkpointing_enable", None)
                enable: Any = getattr(encoder, "activation_checkpointing_enable", old)
                enable({"use_reentrant": False})
        if base.compile:
            # Only the blocks that come many times: one of them is compiled for all, in seconds, not minutes.
            denoiser.compile_repeated_blocks()

    def _precision(self) -> AbstractContextManager[object]:
        if self._dtype is torch.float32:
            return nullcontext()
        # Its weight cache would hold a stale cast of the adapter across the passes of one step.
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)


def frozen(module: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return the module in a type, without gradients, in memory of its own."""
    kept = cast(nn.Module, module).to(dtype).requires_grad_(False).eval()
    for tensor in (*kept.parameters(), *kept.buffers()):
        tensor.data = own_memory(tensor)
    return kept


def place(network: nn.Module, device: torch.device) -> None:
    """Bring a network to a device, unless it is there: its first parameter tells."""
    if next(network.parameters()).device.type != device.type:
        network.to(device)


def check_precision(base: Base, device: torch.device) -> None:
    """
    Raises:
        BadInput: The device cannot compute in the precision asked for.
    """
    if base.mixed_precision == "fp16" and device.type == "cpu":
        raise BadInput("base.mixed_precision fp16 needs a CUDA device", "use bf16 or no on a CPU")
    if base.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise BadInput(
            f"{torch.cuda.get_device_name(device)} cannot compute in bf16", "set base.mixed_precision to fp16"
        )


def padded_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """Return exactly ``length`` tokens of a text."""
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
    return [int(i) for i in ids]


def check_finite(base: Base, pipeline: Any) -> None:
    for part, network in pipeline.components.items():
        if not isinstance(network, nn.Module):
            continue
        for name, weight in network.named_parameters():
            if weight.is_meta:  # diffusers says nothing of what a single file lacks
                raise BadInput(
                    f"base model {base.model} lacks the weights of {part} {name}", "fetch it again"
                )
            if not torch.isfinite(weight).all():
                raise BadInput(
                    f"base model {base.model}: {part} {name} holds NaN or infinity", "fetch it again"
                )
