"""Which controller may work on a sweep: the one that took office last, wherever the others are.

Inside a Ray cluster an actor's name is unique. Two clusters know nothing of each other, and each would take
the other's slots for lost, for ever. So a controller that starts takes the next free number in the store,
create-only, and one that finds a higher number than its own steps down.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass

from storage import layout
from storage.errors import Corrupt, NotFound, Unavailable
from storage.object_store import ObjectStore


class SteppedDown(Exception):
    """A newer controller works on the sweep: this one must leave it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Where the controller runs, or ran, that took office last."""

    term: str
    """Its key in the store: a newer term has a higher one."""
    host: str
    pid: int
    cluster: str = ""
    """Its cluster's address as Ray says it; empty if it did not say."""

    def is_elsewhere(self, host: str, address: str) -> bool:
        """Whether it works on another machine, or on another cluster (port) of this one."""
        if self.host != host:
            return True
        if not self.cluster or address.startswith("ray://"):  # that port is another service's
            return False
        return _port(self.cluster) != _port(address)


def in_office(store: ObjectStore, sweep: str) -> Holder | None:
    """Return who took office last; None if nobody did.

    Raises:
        StorageError: The store does not say.
    """
    keys = [info.key for info in store.list(layout.terms_prefix(sweep))]
    if not keys:
        return None
    try:
        body = json.loads(store.get(max(keys)))
        return Holder(
            term=max(keys),
            host=str(body["host"]),
            pid=int(body["pid"]),
            cluster=str(body.get("cluster", "")),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{max(keys)} in {store.url}: is not what a controller writes") from error


class Term:
    """A controller's time in office."""

    def __init__(self, store: ObjectStore, sweep: str, cluster: str = "") -> None:
        """Take office; ``cluster`` is where this controller works, for those who supervise it.

        Raises:
            StorageError: The store does not let us.
        """
        self._store = store
        self._prefix = layout.terms_prefix(sweep)
        body = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "cluster": cluster,
                "at": time.time(),
                "nonce": secrets.token_hex(16),
            }
        ).encode()
        # After the newest, not after as many as there are: gc deletes old terms.
        taken = (layout.parse_log_entry(self._prefix, info.key) for info in store.list(self._prefix))
        number = max((n for n in taken if n is not None), default=-1) + 1
        while not self._took(layout.term(sweep, number), body):
            number += 1
        self._key = layout.term(sweep, number)

    def check(self) -> None:
        """Make sure that no newer controller has taken office.

        Raises:
            SteppedDown: One has.
            StorageError: The store does not say.
        """
        for newer in self._store.list(self._prefix, after=self._key):
            raise SteppedDown(f"{newer.key}: another controller has taken over this sweep")

    def _took(self, key: str, body: bytes) -> bool:
        try:
            return self._store.create(key, body)
        except Unavailable as error:  # perhaps written, with the reply lost
            try:
                return self._store.get(key) == body
            except (NotFound, Unavailable):
                raise error from None  # the next number would fare no better: who asks again waits first


def _port(address: str) -> str:
    return address.rpartition(":")[2]
