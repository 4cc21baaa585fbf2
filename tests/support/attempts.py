"""An attempt that a supervisor works on while a test looks on."""

import threading

from support.waiting import DEADLINE_S

from trainer.supervisor import Progress, Supervisor
from trainer.training_process import TrainingProcess


class Attempt:
    """A supervisor at work on a thread of its own."""

    def __init__(self, supervisor: Supervisor, process: TrainingProcess | None) -> None:
        self.supervisor = supervisor
        self.process = process
        self.final: Progress | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.final = self.supervisor.run()

    def end(self) -> Progress:
        self._thread.join(DEADLINE_S)
        assert self.final is not None, "the supervisor did not come to an end, or raised"
        assert self.supervisor.progress == self.final
        return self.final
