"""Whether reading from the hub failed on the way, so that trying again may help.

What comes up is not one tree of exceptions: huggingface_hub wraps an HTTP library of its own choice,
diffusers and transformers wrap that again, mostly as a plain ``OSError``, and a file cut short is one from
the start. So the chain of causes is looked at, and libraries are known by name.
"""

import traceback
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

_HTTP_LIBRARIES = {"httpcore", "httpx", "httpx2", "requests", "urllib3"}
_TRY_LATER = (408, 425, 429)
_CUT_SHORT = "Consistency check failed"
"""How huggingface_hub begins what it says of a file that ended before its size."""


def broke_off(error: BaseException) -> bool:
    """Return whether this error, or one of those that led to it, is the network's or the hub's own.

    With ``HF_HUB_OFFLINE`` nobody was asked, so nothing broke off.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):  # an answer: what led to it says no more
            return _try_later(cause)
        if _of_the_way(cause):
            return True
    return False


def _try_later(answer: HfHubHTTPError) -> bool:
    """404 and the like are the model's fault."""
    status = getattr(answer.response, "status_code", None)
    return status is None or status >= 500 or status in _TRY_LATER


def _of_the_way(error: BaseException) -> bool:
    match error:
        case ConnectionError() | TimeoutError() | LocalEntryNotFoundError():
            return True
        case OSError() if str(error).startswith(_CUT_SHORT):
            return True
        case RuntimeError():  # hf_xet, a binary library, has no class of its own for it
            return any(frame.name == "xet_get" for frame in traceback.extract_tb(error.__traceback__))
    return any(base.__module__.partition(".")[0] in _HTTP_LIBRARIES for base in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
