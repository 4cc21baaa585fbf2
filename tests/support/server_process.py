"""A server's process on loopback: started, ended by its own id, and startable again on the same port."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class ServerProcess:
    """One process, with its output in a file. ``start`` after ``kill`` runs the same command again."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self.log = log
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def __str__(self) -> str:
        return self._command[0]

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    def kill(self) -> None:
        """End it as a power cut would: no signal handler, nothing flushed."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Run a server, and end exactly it: at once, since what it keeps is thrown away with the test."""
    process = ServerProcess(command, log, environment)
    try:
        yield process
    finally:
        process.kill()


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def answers(endpoint: str) -> bool:
    """Whether something speaks HTTP at a url; over TLS, whether something listens."""
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()  # also a refusal is an answer
    except urllib.error.URLError as error:
        return "CERTIFICATE_VERIFY_FAILED" in str(error.reason)  # whose certificate is the client's affair
    except OSError:
        return False
    return True


def wait_for(
    ready: Callable[[], bool], timeout_s: float, processes: Sequence[ServerProcess], log: Path
) -> None:
    """Wait until a server is ready.

    Raises:
        RuntimeError: One of the processes has ended, or it takes too long; with the end of the log.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        ended = [str(process) for process in processes if process.ended]
        if ended or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{ended or log.name}: not ready after {timeout_s:g} s:\n{tail}")
        time.sleep(0.05)
