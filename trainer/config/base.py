"""``Base``: the model to start from and how it is trained: one block in a sweep file, here by subject."""

from .adapter import AdapterKeys
from .control import ControlKeys
from .hollow import HollowKeys
from .hypernetwork import HypernetworkKeys
from .model import ModelKeys
from .objective import ObjectiveKeys
from .optimization import OptimizationKeys
from .textual_inversion import TextualInversionKeys
from .trained import TrainedKeys


class Base(
    OptimizationKeys,
    ObjectiveKeys,
    TrainedKeys,
    AdapterKeys,
    HypernetworkKeys,
    HollowKeys,
    ControlKeys,
    TextualInversionKeys,
    ModelKeys,
):
    """The model to start from and how it is trained."""
