"""Moved to ``trainer.dataset``."""

from .dataset.folder import (
    Example,
    dataset_content,
    dataset_digest,
    fill_trigger,
    held_out,
    scan,
)
from .dataset.images import SUFFIXES, read_image
from .dataset.survey import problems

__all__ = [
    "SUFFIXES",
    "Example",
    "dataset_content",
    "dataset_digest",
    "fill_trigger",
    "held_out",
    "problems",
    "read_image",
    "scan",
]
