"""What of a run is trained: something beside a frozen base, or all of the base."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .values import Frozen

Trained = Literal["adapter", "hypernetwork", "full", "textual_inversion"]


def _listed(given: Any) -> Any:
    # By hand: after a validator in Python a list is no longer taken for JSON's, which may stand for a tuple.
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


class TrainedKeys(Frozen):
    train: Annotated[tuple[Trained, ...], BeforeValidator(_listed), Field(min_length=1)] = ("adapter",)
    """What is trained: one of these, or several together."""
