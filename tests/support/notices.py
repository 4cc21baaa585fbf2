"""A notice of a cloud, and an address at which no service listens."""

from orchestrator.notices.notice import Kind, Notice

NOWHERE = "http://127.0.0.1:9"
"""The discard port."""


def spot(left_s: float | None = 120.0, kind: Kind = Kind.TERMINATE) -> Notice:
    return Notice(kind=kind, source="AWS", left_s=left_s)
