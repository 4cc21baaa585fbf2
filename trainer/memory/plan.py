"""What a run will need of a GPU's memory, as a table: by phase, what for, and which keys would lower it.

Pure; ``estimate`` finds the numbers.
"""

from dataclasses import dataclass

from ..config import Base
from ..evidence import less_memory

GB = 1e9
TRAINING = "training"
"""How the name of a phase of training begins; what is trained follows where that changes in a run."""


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that takes memory."""

    what: str
    size: int
    """Bytes."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of a run at which the same things are on the GPU."""

    name: str
    needs: tuple[Need, ...]

    @property
    def size(self) -> int:
        """Bytes of all together."""
        return sum(need.size for need in self.needs)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    phases: tuple[Phase, ...]
    advice: str

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.size)

    def phase(self, name: str) -> Phase:
        """Return the phase of a name, such as ``training``."""
        return next(phase for phase in self.phases if phase.name == name)

    def lines(self, runs_on_a_gpu: int = 1) -> list[str]:
        """Return the plan as text.

        Args:
            runs_on_a_gpu: How many such runs share one.
        """
        widest = max(len(need.what) for phase in self.phases for need in phase.needs)
        told = []
        for phase in self.phases:
            told.append(f"{phase.name}: {phase.size / GB:.2f} GB" + (" (most)" if phase is self.peak else ""))
            told += [
                f"  {need.what:{widest}}  {need.size / GB:9.3f} GB  {need.note}".rstrip()
                for need in phase.needs
                if need.size
            ]
        shared = ""
        if runs_on_a_gpu > 1:
            total = runs_on_a_gpu * self.peak.size
            shared = f"; {runs_on_a_gpu} runs share a GPU: {total / GB:.2f} GB"
        told.append(f"at most {self.peak.size / GB:.2f} GB{shared}")
        told.append("besides: CUDA's own context, half a GB or so, and what the allocator rounds up")
        return [*told, self.advice]


def advice(base: Base, micro_batch: int | None, plan: tuple[Phase, ...]) -> str:
    """Return what would lower the need of training, in order of effect; said if another phase needs more."""
    peak = max(plan, key=lambda phase: phase.size)
    if not peak.name.startswith(TRAINING):
        return f"{peak.name} needs most; in training, " + less_memory(base, micro_batch)
    return less_memory(base, micro_batch)
