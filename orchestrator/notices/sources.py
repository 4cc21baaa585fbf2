"""Who tells this node of its end: what ``resources.notices`` names, or what is found here."""

import contextlib
from pathlib import Path
from typing import Protocol

from ..grid.schema import Notices
from .clouds import Aws, Azure, Gcp
from .metadata import LINK_LOCAL, NobodyHere, Unreachable
from .notice import Notice
from .own import Command, File, Url

DMI = Path("/sys/class/dmi/id")
"""Where Linux says what machine this is; containers see it too."""

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""Microsoft's vendor name alone would be any Hyper-V."""


class Source(Protocol):
    """Somebody who knows of the node's end."""

    def poll(self) -> Notice | None:
        """Return what is announced, or None.

        Raises:
            Unreachable: Nobody answers: nothing is known.
            NobodyHere: And nobody says that this machine is one that is told.
        """


class Cloud(Source, Protocol):
    """A cloud's metadata service."""

    name: str

    def is_here(self) -> bool:
        """Ask whether this cloud's service, and no other, answers this machine. May raise ``Unreachable``."""


class Auto:
    """The cloud that this machine is in; it is looked for until one is found."""

    def __init__(self, base: str = LINK_LOCAL, dmi: Path = DMI) -> None:
        self._clouds: tuple[Cloud, ...] = (Aws(base), Gcp(base), Azure(base))
        self._named = vendor(dmi)
        self._found: Cloud | None = None

    def poll(self) -> Notice | None:
        self._found = self._found or self._look()
        if self._found is None:
            raise NobodyHere("no cloud's metadata service answers here")
        return self._found.poll()

    def _look(self) -> Cloud | None:
        """By the machine's own word; a machine that says nothing known is asked by its network."""
        for cloud in self._clouds:
            if cloud.name == self._named:
                return cloud
            if self._named is None:
                with contextlib.suppress(Unreachable):
                    if cloud.is_here():
                        return cloud
        return None


def vendor(dmi: Path = DMI) -> str | None:
    """Return the cloud that the machine's firmware names."""
    maker, product = _read(dmi / "sys_vendor"), _read(dmi / "product_name")
    if maker == "Amazon EC2" or _read(dmi / "bios_version").endswith("amazon"):
        return Aws.name
    if maker == "Google" or product == "Google Compute Engine":
        return Gcp.name
    if _read(dmi / "chassis_asset_tag") == AZURE_TAG:
        return Azure.name
    return None


def source_of(notices: Notices, base: str = LINK_LOCAL) -> Source | None:
    """Return who is to be asked; None: nobody.

    Args:
        base: Where clouds answer. Anything else is a test's.
    """
    if notices.file:
        return File(Path(notices.file))
    if notices.command:
        return Command(notices.command)
    if notices.url:
        return Url(notices.url)
    match notices.service:
        case "none":
            return None
        case "aws":
            return Aws(base)
        case "gcp":
            return Gcp(base)
        case "azure":
            return Azure(base)
        case "auto":
            return Auto(base)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
