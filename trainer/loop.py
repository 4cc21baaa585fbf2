"""The step loop: from the progress of a checkpoint, or from nothing, to the final checkpoint.

    step ─► validation and samples, where due ─► checkpoint, where due ─► … ─► final checkpoint, with metrics

A stop is obeyed after the step in flight, or in it if there is too little time: state saved, exit 75. The
clock decides when a checkpoint is taken, never what is in it. The loop knows neither the family nor the
method that it trains.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .config import Evaluate
from .errors import Diverged, EvaluationFailed
from .evaluate import evaluate
from .narration import say
from .pacing import Inflation, PaceReader
from .parts import Parts
from .rundir import EXIT_COMPLETE, EXIT_PREEMPTED, append_event
from .sample import draw_images, write_samples
from .snapshot import Progress
from .step import LOWER_RATE, Stepper, in_training
from .stop import Stopped
from .validate import METRIC, validation_loss
from .writing import CheckpointWriter

LOSS_WINDOW = 100
"""Steps that the reported training loss averages over."""


class Loop:
    """One attempt's training."""

    def __init__(self, parts: Parts, progress: Progress) -> None:
        self.parts = parts
        self.progress = progress
        self._base = parts.spec.base
        self._parameters = list(parts.methods.parameters.values())
        self._resumed_step = self._saved_step = progress.step
        self._saved_at = time.monotonic()
        self._metrics: dict[str, float] = {}
        self._pace = PaceReader(parts.run_dir, parts.options)
        self._inflation = Inflation()
        self._writer = CheckpointWriter(
            parts.run_dir.checkpoints,
            parts.methods,
            parts.optimizer,
            self._on_written,
            average=parts.average,
            on_disk_full=lambda problem: self._event("disk_full", message=problem),
            give_up=self._wait_no_longer,
        )
        self._stepper = Stepper(parts, progress.scaler)

    def run(self) -> int:
        """Train to the end or to a stop, and return the exit code.

        Raises:
            Diverged: The loss or its gradient is not finite.
            EvaluationFailed: The evaluate command gave no scores.
        """
        try:
            self.begin()
            while self.progress.step < self._base.max_train_steps:
                self.advance()
            self._finish()
        except Stopped:
            return self._preempted()
        finally:
            self._writer.wait()
        self._event("complete")
        say("the run is complete")
        return EXIT_COMPLETE

    def begin(self) -> None:
        """Do what the checkpoint was taken before."""
        in_training(self.parts.family, self.parts.methods)
        self._validate_if_due()
        self._sample_if_due()

    def advance(self) -> None:
        """Take one step, with what is due after it. Other runs on the same family may take theirs between."""
        self.parts.stop.check()
        self._step()
        self._validate_if_due()
        self._save_if_due()
        self._sample_if_due()

    def _step(self) -> None:
        began, step, writing = time.monotonic(), self.progress.step, self._writer.busy
        mean_loss, rate = self._stepper.take(step)
        done = step + 1
        share = 1 / min(done, LOSS_WINDOW)
        self._metrics = {}
        self.progress = self.progress.model_copy(
            update={
                "step": done,
                "train_loss": (1 - share) * self.progress.train_loss + share * mean_loss,
                "scaler": self._stepper.scaler_state,
            }
        )
        step_s = time.monotonic() - began
        self._inflation.step(step_s, writing=writing)
        if step == self._resumed_step:
            self._event("started", step=step)
            say(f"training from step {step} of {self._base.max_train_steps} on {self.parts.family.device}")
        self._event(
            "step",
            loss=mean_loss,
            lr=rate,
            step_s=step_s,
            first_sample=step * self._base.samples_per_step,
            samples=self._base.samples_per_step,
        )

    def _validate_if_due(self) -> None:
        if self._due(self.parts.spec.validation.every) and self.progress.validated_step < self.progress.step:
            self._validate()

    def _sample_if_due(self) -> None:
        samples = self.parts.spec.samples
        if samples and self._due(samples.every) and self.progress.sampled_step < self.progress.step:
            self._sample()

    def _save_if_due(self) -> None:
        policy, step = self.parts.options.checkpoint, self.progress.step
        by_step = policy.every_steps is not None and self._due(policy.every_steps)
        every_s = self._pace.every_s(step)
        by_time = every_s is not None and time.monotonic() - self._saved_at >= every_s
        # While the last one is still being written a newer one may as well wait: training goes on.
        # Unless there is no room for it: then the run stands still, rather than risk more and more work.
        ready = not self._writer.busy or self._writer.waits_for_room
        if (by_step or by_time) and step < self._base.max_train_steps and ready:
            self._save()

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps is due now. The end has its own turn."""
        step = self.progress.step
        return bool(every) and step > 0 and step % every == 0 and step < self._base.max_train_steps

    def _validate(self) -> None:
        parts = self.parts
        if not parts.validation:
            return
        with self._result_in_use():
            timesteps = parts.spec.validation.timesteps
            value = validation_loss(
                parts.family, parts.validation, parts.texts, timesteps=timesteps, stop=parts.stop
            )
        if not math.isfinite(value):
            raise Diverged(f"step {self.progress.step}: {METRIC} is {value}", LOWER_RATE)
        self._metrics[METRIC] = value
        self.progress = self.progress.model_copy(update={"validated_step": self.progress.step})
        self._event("validation", **{METRIC: value})
        say(f"step {self.progress.step}: {METRIC} {value:.5f}")

    def _sample(self) -> Path:
        parts, step = self.parts, self.progress.step
        with self._result_in_use():
            images = draw_images(parts.family, parts.spec, parts.texts, parts.stop)
            folder = write_samples(parts.run_dir.samples, step, images)
        self.progress = self.progress.model_copy(update={"sampled_step": step})
        self._event("samples", folder=folder.name)
        say(f"step {step}: sample images drawn")
        return folder

    @contextmanager
    def _result_in_use(self) -> Iterator[None]:
        """Within, the base computes with what this run would deliver now."""
        parts = self.parts
        parts.methods.use()
        if parts.average is None:
            yield
            return
        with parts.average.used():
            yield

    def _wait_no_longer(self) -> bool:
        """Whether a checkpoint that waits for room on the disk is given up. Waiting for that is no hang."""
        self.parts.stop.alive()
        return self.parts.stop.requested

    def _save(self, *, final: bool = False) -> None:
        self._check_adapter()
        metrics = {"train/loss": self.progress.train_loss, **self._metrics}
        self._writer.snapshot(self.progress, metrics=metrics, final=final)
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    def _check_adapter(self) -> None:
        """Make sure that what is saved is worth resuming from: the last update may have been one too many.

        Raises:
            Diverged
        """
        norm = float(torch.nn.utils.get_total_norm([parameter.data for parameter in self._parameters]))
        if not math.isfinite(norm):
            raise Diverged(f"step {self.progress.step}: the norm of what is trained is {norm}", LOWER_RATE)

    def _finish(self) -> None:
        """Validate, sample and score the finished adapter; then write the final checkpoint."""
        spec = self.parts.spec
        if self.progress.step == self._resumed_step:
            self._event("started")
        self._validate()
        if spec.samples:
            samples = self._sample()
            if spec.evaluate:
                found = self._evaluate(spec.evaluate, samples)
                self._event("score", scores=found)
                say("scores: " + ", ".join(f"{name} {value:.5g}" for name, value in found.items()))
                self._metrics |= found
        self._save(final=True)
        self._writer.wait()

    def _evaluate(self, evaluation: Evaluate, samples: Path) -> dict[str, float]:
        try:
            return evaluate(evaluation, samples, self.parts.stop)
        except EvaluationFailed:
            self._save_progress()  # another attempt need only evaluate
            raise

    def _save_progress(self) -> None:
        """Write what no checkpoint holds yet, and wait for it."""
        if self.progress.step > self._saved_step:
            self._save()
        self._writer.wait()

    def _preempted(self) -> int:
        self._save_progress()
        self._event("preempted")
        say(f"asked to stop; step {self.progress.step} is saved")
        return EXIT_PREEMPTED

    def _on_written(self, step: int, stall_s: float, write_s: float) -> None:
        told = {"stall_s": stall_s, "write_s": write_s, "inflation_s": self._inflation.taken()}
        append_event(self.parts.run_dir.events, "checkpoint", step=step, **told)
        say(f"step {step} of {self._base.max_train_steps} saved; loss of late {self.progress.train_loss:.5f}")

    def _event(self, event: str, **fields: Any) -> None:
        append_event(self.parts.run_dir.events, event, **{"step": self.progress.step, **fields})
