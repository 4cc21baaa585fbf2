"""Holds runs open at their end until a test lets them finish: how fast the machine is does not matter.

gate = Gate(folder)
grid.yaml: ... {gate.grid}
gate.open()
"""

from pathlib import Path

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
    def grid(self) -> str:
        """The blocks of ``grid.yaml`` that put it at the end of every run."""
        return (
            "samples: {prompts: [a sign], steps: 1}\n"
            f"evaluate: {{command: [python, {self._script}], timeout_s: 900}}\n"
        )

    def open(self) -> None:
        self._go.touch()
