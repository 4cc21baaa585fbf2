"""The base model: which one, in what precision, and what is put into it before training begins."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Frozen, Sha256


class MergedAdapter(Frozen):
    """An adapter that is merged into the base before anything is trained, and is no part of the result."""

    path: str
    """A ``.safetensors`` file of diffusers, kohya or LyCORIS."""
    weight: float = 1.0
    digest: Sha256 | None = None


class ModelKeys(Frozen):
    model: str
    """A hub id, a local diffusers folder, or a single ``.safetensors`` file."""
    revision: str | None = None
    """Commit of the hub repository."""
    digest: Sha256 | None = None
    """sha256 over a local model's files, pinned at submission; a node whose files differ refuses to train."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """The frozen base is kept in this precision; the adapter always trains in fp32."""
    quantize: Literal["none", "int8", "nf4", "fp8"] = "none"
    """Keep the frozen denoiser in fewer bits: its linear layers in ``int8`` or ``nf4``, with ``fp8`` its
    convolutions too."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts; by default what the model's scheduler configuration says."""
    zero_terminal_snr: bool = False
    """Rescale the noise levels so that the last timestep is pure noise (Lin et al. 2024); v-prediction."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """SD 1.x and 2.x: which of the text encoder's layers is read, counted from the end; 1 is the last."""
    merged_adapters: tuple[MergedAdapter, ...] = ()
    """Adapters merged into the base first."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    channels_last: bool = False
    """Keep the denoiser's convolutions in channels-last layout: faster on GPUs with tensor cores."""
    compile: bool = False
    """Compile the denoiser with ``torch.compile``: minutes at the start, faster steps after."""
