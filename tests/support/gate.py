"""Holds runs open at their end until a test lets them finish: how fast the machine is does not matter.

gate = Gate(folder)
grid.yaml: ... {gate.grid}         or, of one run, RunSpec(..., **gate.blocks)
gate.open()
"""

import json
from pathlib import Path
from typing import Any

_SCRIPT = """
import pathlib, time
while not pathlib.Path({go!r}).exists():
    time.sleep(0.05)
print('{{"passed": 1}}')
"""


class Gate:
    """An evaluation command that ends once the gate is open. Without its number a run has no result."""

    def __init__(self, folder: Path) -> None:
        self._go = folder / "go"
        self._script = folder / "gate.py"
        self._script.write_text(_SCRIPT.format(go=str(self._go)))

    @property
    def blocks(self) -> dict[str, Any]:
        """The blocks of a run's spec that put it at the run's end."""
        return {
            "samples": {"prompts": ["a sign"], "steps": 1},
            "evaluate": {"command": ["python", str(self._script)], "timeout_s": 900},
        }

    @property
    def grid(self) -> str:
        """The same for every run of a ``grid.yaml``."""
        return "".join(f"{name}: {json.dumps(block)}\n" for name, block in self.blocks.items())

    def open(self) -> None:
        self._go.touch()

    def close(self) -> None:
        self._go.unlink(missing_ok=True)
