"""What ``support.fault_proxy`` can do to a request, and to which one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FOREVER = 1 << 60
"""As a number of times."""


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with an S3 error at once, and pass nothing on."""

    status: int
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrickleUp:
    """Take the request's body slowly."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TrickleDown:
    """Give the answer slowly, headers included."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class BlackHole:
    """Take the request's head, then nothing more, and answer nothing."""


@dataclass(frozen=True, slots=True)
class ResetUp:
    """Reset the connection after so many bytes of the request's body; the server never sees the rest."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class CorruptUp:
    """Pass the request on with the first byte of its body changed."""


@dataclass(frozen=True, slots=True)
class TruncateDown:
    """Close the connection after so many bytes of the answer's body."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class LoseReply:
    """Let the server do it, then close the connection without a word."""


@dataclass(frozen=True, slots=True)
class StripHeader:
    """Pass the request on without a header."""

    name: str


@dataclass(frozen=True, slots=True)
class StaleAnswer:
    """Repeat the first answer that was ever given to this method and path."""


Fault = (
    Status
    | TrickleUp
    | TrickleDown
    | BlackHole
    | CorruptUp
    | ResetUp
    | TruncateDown
    | LoseReply
    | StripHeader
    | StaleAnswer
)


@dataclass(slots=True)
class Seen:
    """A request that came, and what has happened to it so far."""

    method: str
    path: str
    """Path and query, percent-decoded."""
    headers: Mapping[str, str]
    at: float
    """Monotonic seconds."""
    received_bytes: int = 0
    """Of the body, from the client."""
    answered: int | None = None
    """The status that the client was given."""
    fault: Fault | None = None


Matches = Callable[[Seen], bool]


def matching(method: str = "", text: str = "") -> Matches:
    """Requests of a method, if given, whose path or query contains a text."""
    return lambda seen: (not method or seen.method == method) and text in seen.path
