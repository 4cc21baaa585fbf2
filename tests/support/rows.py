"""What one fault did to a sweep."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """Of the run that was hit, and of what stood beside it."""

    fault: str
    profile: str
    recovered: bool
    """Every run ended with the very bytes that it has without the fault."""
    restarts: int
    lost_steps: int
    """Steps that were trained for nothing."""
    detect_s: float | None
    """From the fault to the record of the attempt's end; None where there is none."""
    again_s: float | None
    """From the fault to the first new step of the next attempt; None where the same one trained on."""
    zombie_commits: int
    """Commits of superseded attempts that the log let in."""
    zombie_s: float | None = None
    """From the next attempt's first step, or from the way back, to the end of the superseded trainer."""
    needless_restarts: int
    left_behind: int

    @property
    def holds(self) -> bool:
        return self.recovered and not (self.zombie_commits or self.needless_restarts or self.left_behind)
