"""A frozen ControlNet: where it comes from, whether it fits a UNet, and what it adds to one's layers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from huggingface_hub import constants
from torch import Tensor

from ..config.control import Control
from ..errors import BadInput, BaseUnavailable
from ..hub_transfer import broke_off

_ALIKE = ("cross_attention_dim", "addition_embed_type", "block_out_channels", "in_channels")
"""What a ControlNet's configuration and that of its UNet have in common."""


def load_control(control: Control, hub_cache: Path | None = None, *, weights: bool = True) -> Any:
    """Return the ControlNet on the CPU; without ``weights`` on the meta device, from its configuration alone.

    Raises:
        BadInput: There is none, or it is of another kind.
        BaseUnavailable: The hub did not answer.
    """
    name = f"base.control: {control.model}"
    path = Path(control.model).expanduser()
    if not path.is_dir() and (path.exists() or control.model.startswith((".", "/", "~"))):
        raise BadInput(f"{name} is no folder", "give a diffusers folder of a ControlNet, or a hub id")
    where: dict[str, Any] = {} if path.is_dir() else {"revision": control.revision, "cache_dir": hub_cache}
    place = str(path) if path.is_dir() else control.model
    try:
        config: Any = ControlNetModel.load_config(place, **where)
        kind = config.get("_class_name")
        if kind != "ControlNetModel":
            raise BadInput(f"{name} is a {kind}, not a ControlNetModel", "give a ControlNet of SD 1, 2 or XL")
        if weights:
            return ControlNetModel.from_pretrained(place, use_safetensors=True, **where)
        with torch.device("meta"):
            return ControlNetModel.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if broke_off(error) and not constants.HF_HUB_OFFLINE:
            raise BaseUnavailable(
                f"{name}: the hub did not answer: {error}",
                "give a local folder, or check this node's network",
            ) from error
        raise BadInput(
            f"{name} cannot be loaded: {error}", "give a diffusers folder of a ControlNet, or a hub id"
        ) from error


def misfit(network: Any, unet: Any, latent_pixels: int) -> str | None:
    """Say why a ControlNet is not one of a UNet, or return None."""
    for key in _ALIKE:
        mine, theirs = network.config[key], unet.config[key]
        if mine != theirs and tuple(_listed(mine)) != tuple(_listed(theirs)):
            return f"its {key} is {mine}, that of the base's UNet {theirs}"
    if network.config.conditioning_channels != 3:
        return f"it sees {network.config.conditioning_channels} channels, an image has 3"
    pixels = 2 ** (len(network.config.conditioning_embedding_out_channels) - 1)
    if pixels != latent_pixels:
        return f"it makes one place of {pixels} pixels a side, the base's VAE of {latent_pixels}"
    return None


@torch.no_grad()
def residuals(
    network: Any, scale: float, noisy_BCHW: Tensor, timesteps_B: Tensor, image_B3HW: Tensor, told: Any
) -> dict[str, Any]:
    """Return what goes into the UNet of a condition image in [0, 1], by the names that the UNet has for it.

    Args:
        told: What the UNet is told besides, by its own names.
    """
    skipped, middle = network(
        *(noisy_BCHW, timesteps_B),
        controlnet_cond=image_B3HW.to(noisy_BCHW.dtype),
        conditioning_scale=scale,
        return_dict=False,
        **told,
    )
    return {"down_block_additional_residuals": skipped, "mid_block_additional_residual": middle}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
