"""Counters of an agent, exported with Ray's own metrics as ``ray_orch_…``. Labels are bounded."""

from ray.util.metrics import Counter, Gauge


class AgentMetrics:
    """What one agent counts, whichever runs it serves."""

    def __init__(self, sweep: str) -> None:
        self._sweep = {"sweep": sweep}
        self._steps = Counter("orch_steps_total", "Optimizer steps trained.", tag_keys=("sweep",))
        self._attempts = Counter("orch_attempts_total", "Attempts started.", tag_keys=("sweep",))
        self._fenced = Counter("orch_fenced_total", "Attempts stopped by a newer one.", tag_keys=("sweep",))
        self._step = Gauge("orch_run_step", "The run's newest step.", tag_keys=("sweep", "run"))
        self._counted = 0

    def attempt_started(self) -> None:
        self._attempts.inc(tags=self._sweep)
        self._counted = 0

    def stepped(self, run_id: str, step: int, resumed_from: int) -> None:
        """Count the steps since the last call; those before ``resumed_from`` were another attempt's."""
        new = step - max(self._counted, resumed_from)
        if new > 0:
            self._steps.inc(new, tags=self._sweep)
            self._step.set(step, tags=self._sweep | {"run": run_id})
            self._counted = step

    def fenced(self) -> None:
        self._fenced.inc(tags=self._sweep)
