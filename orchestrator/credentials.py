"""Which keys of a sweep file hold a secret. What a secret itself looks like: ``storage.redaction``.

A sweep file is copied to the bucket and shown in reports: credentials belong in the environment or in the
provider's own files.
"""

import re

from storage.redaction import looks_secret, redacted

__all__ = ["looks_secret", "names_secret", "redacted"]

_KEYS = re.compile(
    r"(?:^|_)(?:secret|password|passwd|token|api_?key|access_?key|secret_?key|private_?key|credential)s?(?:$|_)"
)
_REFERENCE = re.compile(r"_(?:env|file)$")
_OF_TEXTS = re.compile(r"(?:^|\.|-)(?:keep_tokens|tokens_until|token_norm|token_learning_rate)$")
"""Tokens of a caption, and words that a run teaches."""


def names_secret(key: str) -> bool:
    """True if a value under this key would be a secret. ``token_env`` only says where one is."""
    key = key.lower()
    return _KEYS.search(key) is not None and not _REFERENCE.search(key) and not _OF_TEXTS.search(key)
