"""The Ray head that a supervisor keeps up: the local one, one that a command starts, or somebody else's.

    head.ensure()    start it if it is not there, and return its address
    head.down()      it was there and is gone; asked every second or so
    head.restart()   end it if it is ours, so that ``ensure`` starts another
    head.close()     end it if it is ours
    head.leave()     the same when the sweep is over, but the local one ends by itself: others may have joined

Only what was started here, and what descends from it, is ever ended. A supervisor is no client of Ray: one
would be ended with its cluster.
"""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Protocol

import psutil

from ..errors import OrchestrateError
from ..on_ray import detection, local_ray
from ..on_ray.lineage import Lineage
from ..on_ray.local_ray import LocalRay

DEAF_S = 10.0
"""A head whose port has refused connections for so long is gone, whatever of it still runs."""

START_S = 120.0
STOP_S = 30.0


class HeadFailed(OrchestrateError):
    """The head does not come up, this time."""


class Head(Protocol):
    """Where the controller is to live."""

    @property
    def owned(self) -> bool:
        """We started it, and it was not seen to end since."""

    def ensure(self) -> str:
        """Start the head unless it is there; return its address.

        Raises:
            HeadFailed: It did not come up, or nobody answers at its address.
        """

    def down(self) -> bool:
        """Whether the head is gone, or so deaf that it might as well be."""

    def restart(self) -> None:
        """End the head if it is ours; ``ensure`` starts another."""

    def close(self) -> None:
        """End the head if it is ours."""

    def leave(self) -> None:
        """The sweep is over: as ``close``, but for a head that others may be using."""


class Listener:
    """Tells since when nobody listens at an address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_at = clock()

    def deaf(self, address: str) -> bool:
        """Whether the address has been deaf for ``DEAF_S``."""
        now = self._clock()
        if local_ray.answers(address):
            self._heard_at = now
        return now - self._heard_at >= DEAF_S


class LocalHead:
    """The local cluster, with its workers: started when there is none, joined when there is one.

    When the sweep is over it is left to end by itself, as it does once no sweep uses it.
    """

    def __init__(self) -> None:
        self._cluster: LocalRay | None = None
        self._lineage: Lineage | None = None
        self._listener = Listener()

    @property
    def owned(self) -> bool:
        return self._lineage is not None

    def ensure(self) -> str:
        if self._cluster is None:
            try:
                found = local_ray.find_or_start()
            except RuntimeError as error:
                raise HeadFailed(str(error)) from error
            self._cluster, self._listener = found, Listener()
            self._lineage = Lineage(found.host_pid) if local_ray.started_here(found) else None
        return self._cluster.address

    def down(self) -> bool:
        if self._lineage:
            self._lineage.look()
        cluster = self._cluster
        if cluster is None or not cluster.alive:
            return True
        no_workers = not any(_runs(pid) for pid in cluster.raylet_pids.values())
        return no_workers or self._listener.deaf(cluster.address)

    def restart(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster and self._lineage:
            self._lineage.kill()
            local_ray.stop(cluster)  # reaps it
        self._lineage = None

    def close(self) -> None:
        self.restart()

    def leave(self) -> None:
        pass


class CommandHead:
    """A head that a command runs in the foreground, such as ``ray start --head --block``.

    If something answers at its address already, that is taken for the head of a supervisor that was killed:
    it is used as long as it lives, and the command comes after it.
    """

    def __init__(self, command: list[str], address: str, profile: str, stop: threading.Event) -> None:
        """``stop``: nobody waits for a head any more."""
        self._command = command
        self._stop = stop
        self._address = address
        usual = {**detection.as_environment(profile), "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment = {**usual, **os.environ}
        self._environment.pop("RAY_ADDRESS", None)  # it is for those who join
        self._process: subprocess.Popen[bytes] | None = None
        self._lineage: Lineage | None = None
        self._listener = Listener()

    @property
    def owned(self) -> bool:
        return self._process is not None

    def ensure(self) -> str:
        if self._process is None and not local_ray.answers(self._address):
            self._start()
        self._listener = Listener()
        return self._address

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, env=self._environment, start_new_session=True
            )
        except OSError as error:
            raise HeadFailed(f"{self._command[0]}: {error.strerror}") from error
        self._lineage = Lineage(self._process.pid)
        deadline = time.monotonic() + START_S
        while not local_ray.answers(self._address):
            self._lineage.look()
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                self.restart()
                how = f"nobody answers at {self._address} after {START_S:.0f} s"
                if code is not None:
                    how = f"it exited with code {code} (it must stay in the foreground, as with --block)"
                raise HeadFailed(f"{' '.join(self._command)}: {how}")
            if self._stop.wait(0.2):
                self.restart()
                raise HeadFailed("asked to stop while the head was starting")

    def down(self) -> bool:
        if self._lineage:
            self._lineage.look()
        if self._process and self._process.poll() is not None:
            return True
        return self._listener.deaf(self._address)

    def restart(self) -> None:
        if self._process and self._lineage:
            self._lineage.look()
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
            self._lineage.kill()
            self._process.wait(STOP_S)
        self._process = self._lineage = None

    def close(self) -> None:
        self.restart()

    def leave(self) -> None:
        self.restart()


class RemoteHead:
    """Somebody else's: it is waited for, and never touched."""

    def __init__(self, address: str) -> None:
        self._address = address

    @property
    def owned(self) -> bool:
        return False

    def ensure(self) -> str:
        if not local_ray.answers(self._address):
            raise HeadFailed(f"nobody answers at {self._address}")
        return self._address

    def down(self) -> bool:
        return False  # the child finds out by itself; a blip of the network is no reason to begin anew

    def restart(self) -> None:
        pass

    def close(self) -> None:
        pass

    def leave(self) -> None:
        pass


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
