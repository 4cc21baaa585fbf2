"""What is measured and drawn while a run trains, and at its end."""

from typing import Annotated

from pydantic import Field

from .values import Frozen


class Validation(Frozen):
    """The loss by which runs are compared: at fixed images, timesteps and noise, only adapters differ."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0: only at the end."""
    timesteps: Annotated[int, Field(ge=1)] = 8
    """How many timesteps, evenly spaced over the schedule, each held-out image is noised to."""


class Samples(Frozen):
    """Images drawn from the adapter while it trains."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    negative: str = ""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between samplings; 0: only at the end."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Denoising steps of DPM-Solver multistep."""
    cfg: Annotated[float, Field(ge=0)] = 7.5


class Evaluate(Frozen):
    """A command that scores the final samples; its last line of output is a JSON object of numbers."""

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Arguments; ``{samples}`` becomes the folder of images, whose ``index.json`` names each one's prompt and
    seed."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
