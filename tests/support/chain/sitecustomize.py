"""Lets ``python -m trainer.process`` train a chain of digests instead of a model, where this folder is on
``PYTHONPATH``: Python imports a module of this name when it starts.

Everything of the training process but the attempt itself is the real thing: how it is started warm, given
work, stopped, and ended with whoever holds it. A step takes a fixed time and no CPU, so that many nodes fit
on one machine and lost steps do not depend on how fast it is. The adapter is the digest of all steps in order
and of the seed: it is the same after an interruption only if no step was left out or made twice.
"""

import hashlib
import json
import subprocess
import sys
import time
import types
from typing import Any

STEP_S = 0.1


def run_attempt(run_dir: Any, stop: Any) -> int:
    """As ``trainer.attempt.run_attempt``."""
    from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, StartOrder, append_event

    spec = json.loads(run_dir.spec.read_text())
    steps = spec["base"]["max_train_steps"]
    every = json.loads(run_dir.options.read_text())["checkpoint"]["every_steps"] or steps
    while not run_dir.start.exists():
        time.sleep(0.02)
    resume = StartOrder.model_validate_json(run_dir.start.read_bytes()).resume
    step, digest = 0, hashlib.sha256(str(spec["base"]["seed"]).encode()).digest()
    if resume:
        step = json.loads((run_dir.root / resume / "manifest.json").read_text())["step"]
        digest = (run_dir.root / resume / "adapter.safetensors").read_bytes()
    stop.exit_at_once = False
    append_event(run_dir.events, "started", step=step)
    while step < steps and not stop.requested:
        time.sleep(STEP_S)
        step += 1
        digest = hashlib.sha256(digest + step.to_bytes(4, "big")).digest()
        append_event(run_dir.events, "step", step=step, loss=1 / step, lr=0.1, step_s=STEP_S)
        if step % every == 0 and step < steps and not stop.requested:
            _save(run_dir, step, digest)
    if stop.requested or not _evaluated(spec["evaluate"]["command"], stop):
        _save(run_dir, step, digest)
        append_event(run_dir.events, "preempted", step=step)
        return int(EXIT_PREEMPTED)
    _save(run_dir, step, digest, final=True)
    append_event(run_dir.events, "complete", step=step)
    return int(EXIT_COMPLETE)


def _save(run_dir: Any, step: int, digest: bytes, *, final: bool = False) -> None:
    from storage.local import staged_checkpoint, step_dir
    from trainer.rundir import append_event

    if not final and (run_dir.checkpoints / step_dir(step)).exists():
        return
    with staged_checkpoint(run_dir.checkpoints, step, metrics={"step": step}, final=final) as to:
        (to / "adapter.safetensors").write_bytes(digest)
    append_event(run_dir.events, "checkpoint", step=step, stall_s=0.0, write_s=0.0, inflation_s=0.0)


def _evaluated(command: list[str], stop: Any) -> bool:
    """Wait for the run's own judge, a gate that a test opens; False if a stop came first."""
    judge = subprocess.Popen([sys.executable, *command[1:]], stdout=subprocess.DEVNULL)
    while judge.poll() is None and not stop.requested:
        time.sleep(0.02)
    judge.kill()
    return judge.wait() == 0


if sys.orig_argv[-2:] == ["-m", "trainer.process"]:
    import os

    import trainer.process

    attempt = types.ModuleType("trainer.attempt")
    attempt.run_attempt = run_attempt
    sys.modules["trainer.attempt"] = attempt
    trainer.process._import_everything = lambda: None
    code = trainer.process.main()
    sys.stdout.flush()
    os._exit(code)
