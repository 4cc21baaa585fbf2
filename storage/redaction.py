"""What a secret looks like, and what a terminal would obey: neither is stored, sent or printed by accident.

What trainers say ends in records, logs and reports. The patterns catch what people paste and libraries print;
they do not prove that a text is harmless.
"""

import re

_REDACTED = "[redacted]"
_VALUES = re.compile(
    r"""
      \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                          # AWS access key id
    | \bhf_[A-Za-z0-9]{20,}                                  # Hugging Face
    | \bgh[pousr]_[A-Za-z0-9]{30,}                           # GitHub
    | \bsk-[A-Za-z0-9_-]{20,}                                # several API vendors
    | hooks\.slack\.com/services/[A-Za-z0-9/]+               # Slack
    | \bBearer\s+[A-Za-z0-9._~+/=-]{8,}
    | (?i:X-Amz-(?:Signature|Credential|Security-Token))(?:=|%3D)[^&\s'"\\]+
    | (?<=://)[^/@\s'"]{1,200}:[^/@\s'"]{1,200}(?=@)         # user:password in a url
    """,
    re.VERBOSE,
)
_ASSIGNED = re.compile(
    r"""
    ( \b[\w-]{0,40}
      (?: secret(?:[_-]?(?:access|api))?(?:[_-]?key)? | password | passwd | [_-]token | api[_-]?key
        | access[_-]?key(?:[_-]?id)? )
      \\?["']?\s*[=:]\s*\\?["']? )
    [A-Za-z0-9/+_=.~-]{8,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_USERINFO = re.compile(r"""(?<=://)[^/@\s'"\\]{1,400}(?=@)""")

_SEQUENCES = re.compile(
    r"""
      (?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]                                    # colours, the cursor
    | (?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)  # titles, links, clipboard
    | \x1b[ -/]*[0-~]
    """,
    re.VERBOSE,
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""All that a terminal may act on, or that shows a text in another order, but for tab and newline."""


def looks_secret(text: str) -> bool:
    """True if the text contains something with the shape of a credential."""
    return _VALUES.search(text) is not None


def redacted(text: str) -> str:
    """Return the text with what looks like a credential replaced."""
    text = _USERINFO.sub(_REDACTED, _VALUES.sub(_REDACTED, text))
    return _ASSIGNED.sub(lambda found: found[1] + _REDACTED, text)


def printable(text: str) -> str:
    """Return the text without what a terminal would obey instead of showing it. Tabs and newlines stay."""
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))
