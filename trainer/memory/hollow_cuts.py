"""Which cut of a hollowed UNet keeps training within a limit of memory: the smallest that does."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from ..config import RunSpec
from ..errors import BadInput
from ..families.hollow import taking
from ..families.unloaded import unloaded_family
from .estimate import estimate
from .plan import GB, TRAINING


def cuts_until(spec: RunSpec, below: float, *, micro_batch: int | None = None) -> Iterator[str]:
    """Yield a line for no cut, cut 0, 1…, up to the first with which training needs less than a limit.

    Args:
        below: In bytes. Of training alone: encoding images and drawing samples use the whole UNet.

    Raises:
        BadInput: No cut is deep enough, or the run cannot be hollowed. Says why.
    """
    first = _hollowed(spec, 0)
    needed = _training_bytes(spec, None, micro_batch)
    yield f"whole UNet: training needs {needed / GB:.2f} GB"
    if needed < below:
        yield "base.hollow is not needed"
        return
    family: Any = unloaded_family(first.base)
    for cut in range(len(taking(family.denoiser))):
        needed = _training_bytes(spec, cut, micro_batch)
        yield f"base.hollow {cut}: training needs {needed / GB:.2f} GB"
        if needed < below:
            yield f"write into base: hollow: {cut}"
            return
    raise BadInput(
        f"with no cut training needs less than {below / GB:.2f} GB",
        "set gradient_checkpointing to true, or quantize the base",
    )


def _training_bytes(spec: RunSpec, cut: int | None, micro_batch: int | None) -> int:
    return estimate(_hollowed(spec, cut), micro_batch=micro_batch).phase(TRAINING).size


def _hollowed(spec: RunSpec, cut: int | None) -> RunSpec:
    told = spec.model_dump(mode="json")
    try:
        return RunSpec.model_validate({**told, "base": {**told["base"], "hollow": cut}})
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise BadInput(why, "plan without --hollow-below") from error
