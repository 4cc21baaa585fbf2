"""A training process without torch: honours the contract in ``trainer.rundir`` and starts at once.

    python light_trainer.py MODE

``steps``: six steps, a checkpoint after each, samples before the last, then exit 0. ``forever``: steps until
SIGTERM, then exit 75.
``deaf``: one step, then sleeps through SIGTERM, with a child that does too. ``broken``: events that are none,
an error that no record could carry, exit 1. ``damaged``: a final checkpoint that is not what it says, exit 0.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from storage.local import staged_checkpoint, step_dir
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, RunDir, StartOrder, append_event

MAX_STEPS = 6
PAUSE_S = 0.01
"""A step's duration; also how often a waiting process looks again."""


def main(mode: str) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    run_dir = RunDir(Path(json.loads(sys.stdin.readline())["run_dir"]))
    while not run_dir.start.exists():
        if asked:
            return EXIT_PREEMPTED
        time.sleep(PAUSE_S)
    order = StartOrder.model_validate_json(run_dir.start.read_bytes())
    step = (
        json.loads((run_dir.root / order.resume / "manifest.json").read_text())["step"] if order.resume else 0
    )
    match mode:
        case "deaf":
            train(run_dir, step + 1)
            sleeper = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            child = subprocess.Popen([sys.executable, "-c", sleeper])
            append_event(run_dir.events, "child", pid=child.pid)
            while True:
                time.sleep(PAUSE_S)
        case "broken":
            train(run_dir, step + 1)
            with run_dir.events.open("a") as file:
                file.write('{"event": "step", "st\n[1, 2]\nnull\n{"event": "step", "step": "two"}\n')
            run_dir.log.write_text("a line\nand the last, without an end")
            append_event(
                run_dir.events, "error", type="OSError", message="no\nfile \udcff.png" + "x" * 5000, hint=""
            )
            return 1
        case "damaged":
            elsewhere = run_dir.root / "elsewhere"
            save(elsewhere, step + 1, final=True)
            (elsewhere / step_dir(step + 1) / "adapter.safetensors").write_bytes(b"other bytes")
            (elsewhere / step_dir(step + 1)).rename(run_dir.checkpoints / step_dir(step + 1))
            return EXIT_COMPLETE
    while not asked and (mode == "forever" or step < MAX_STEPS):
        step += 1
        last = mode == "steps" and step == MAX_STEPS
        if last:
            (run_dir.samples / step_dir(step)).mkdir(parents=True)
            (run_dir.samples / step_dir(step) / "index.json").write_text("[]")
        train(run_dir, step, final=last)
        time.sleep(PAUSE_S)
    return EXIT_PREEMPTED if asked else EXIT_COMPLETE


def train(run_dir: RunDir, step: int, *, final: bool = False) -> None:
    append_event(run_dir.events, "step", step=step, loss=1 / step, lr=0.1, step_s=PAUSE_S)
    save(run_dir.checkpoints, step, final=final)


def save(root: Path, step: int, *, final: bool) -> None:
    with staged_checkpoint(root, step, metrics={"loss": 1 / step}, final=final) as directory:
        (directory / "adapter.safetensors").write_bytes(b"weights %d" % step)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)
