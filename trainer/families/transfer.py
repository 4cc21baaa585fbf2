"""See ``trainer.hub_transfer``."""

from ..hub_transfer import broke_off

__all__ = ["broke_off"]
