"""What one fault did to a sweep, and what all of them did."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass


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


def summary(rows: Iterable[RowResult], *, passed: bool) -> dict[str, object]:
    """All rows as one JSON object; a row that never came to its end is none of them: ``passed`` knows."""
    found = {f"{row.fault}, {row.profile}": row for row in rows}
    return {
        "rows": len(found),
        "holds": passed and all(row.holds for row in found.values()),
        "faults": {name: _rounded(asdict(row)) for name, row in found.items()},
    }


def _rounded(row: dict[str, object]) -> dict[str, object]:
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
