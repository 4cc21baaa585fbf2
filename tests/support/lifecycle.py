"""What ends an attempt at a run, as events and as records, and the policy that judges it."""

from orchestrator.control.lifecycle import Exited, Policy
from storage.records import Ended, EndReason, Finished, Outcome

POLICY = Policy(max_failures=3, backoff_s=5.0, max_backoff_s=60.0)
NOW = 100.0


def end(attempt: int, reason: EndReason = EndReason.APP_ERROR, detail: str = "boom") -> Ended:
    return Ended(attempt=attempt, reason=reason, detail=detail, exit_code=1, at=50.0)


def exited(code: int, attempt: int = 1, error: str = "", step: int = 0) -> Exited:
    return Exited(at=NOW, attempt=attempt, code=code, error=error, step=step, step_s=0.5)


def finished(outcome: Outcome, step: int = 0, detail: str = "") -> Finished:
    return Finished(outcome=outcome, step=step, detail=detail, at=NOW)


def ended(reason: EndReason, code: int, detail: str, *, attempt: int = 1, step: int = 0) -> Ended:
    return Ended(attempt=attempt, reason=reason, detail=detail, step=step, exit_code=code, step_s=0.5, at=NOW)
