"""Hollowed Net (Jeong et al. 2024, arXiv 2411.01179): training without the deepest layers of the UNet."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Frozen

Cut = (
    Literal["auto"] | Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^up_blocks\.\d+(\.\d+)?$")]
)


class HollowKeys(Frozen):
    hollow: Cut | None = None
    """Take the deepest layers out of the UNet while it is trained; what the frozen model computes in them is
    computed once, before. So many skip connections go with them (0: only the middle), or the first layer of
    the decoder that stays, such as ``up_blocks.1`` or ``up_blocks.1.2``; ``auto``: 3, for SDXL 1."""
    hollow_pool: Annotated[int, Field(ge=1)] = 1000
    """With ``hollow``: so many samples (image, crop, caption, noise, timestep) are looked at before, and kept
    on the disk, 0.6 MiB each, 2.5 of SDXL; a longer run goes through the same ones again."""
