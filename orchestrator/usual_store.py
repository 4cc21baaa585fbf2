"""Which store is meant where none is named, and how a command line says that another one is."""

import os
import shlex

DEFAULT_STORE = "file://./orchestrate-store"


def store_flag(url: str) -> str:
    """Return what a command line needs to mean this store; nothing if it is the one that is meant anyway."""
    from storage.errors import InvalidName
    from storage.url import open_store

    try:
        usual = open_store(os.environ.get("ORCHESTRATE_STORE") or DEFAULT_STORE).url
    except InvalidName:
        usual = None
    return "" if url == usual else f" --store {shlex.quote(url)}"
