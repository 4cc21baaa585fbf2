"""ControlNet (Zhang et al. 2023) while an adapter is trained: it tells what the condition image shows."""

from typing import Annotated

from pydantic import Field

from .values import Frozen, Positive, Sha256


class Control(Frozen):
    """A frozen ControlNet whose residuals go into the UNet in training and validation."""

    model: Annotated[str, Field(min_length=1)]
    """A hub id or a local diffusers folder."""
    revision: str | None = None
    """Commit of the hub repository."""
    digest: Sha256 | None = None
    """sha256 over a local model's files, pinned at submission."""
    scale: Positive = 1.0
    """Multiplies the residuals."""


class ControlKeys(Frozen):
    control: Control | None = None
    """A ControlNet that sees ``dataset.control`` beside each image, so that the adapter need not learn what
    the condition shows. Samples are drawn without it."""
