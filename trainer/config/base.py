"""``Base``: the model to start from and how it is trained. One block in a sweep file, five subjects here."""

from .adapter import AdapterKeys
from .model import ModelKeys
from .objective import ObjectiveKeys
from .optimization import OptimizationKeys


class Base(OptimizationKeys, ObjectiveKeys, AdapterKeys, ModelKeys):
    """The model to start from and how it is trained."""
