"""A process that may open no more files, as when another of its threads has taken them all."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_files_to_open() -> Iterator[None]:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))
