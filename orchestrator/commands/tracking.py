"""Writes what runs measured for TensorBoard or Weights & Biases, from the store. Called again, it goes on.

Only steps up to the newest committed checkpoint are written: they stand, whatever becomes of the nodes. What
was written is remembered beside it, in ``<run>.<tracker>.json``. The trackers work in a process of the
trainer's.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from storage.log import run_log
from storage.object_store import ObjectStore

from ..errors import OrchestrateError, Unknown
from ..grid.sweep import PlannedRun
from ..reports.series import Row, series
from ..reports.trainer_logs import read_lines


def track_run(store: ObjectStore, sweep: str, run: PlannedRun, *, to: str, out: Path) -> int:
    """Write what a run measured since the last time, and return how many steps that were.

    Raises:
        OrchestrateError: The tracker could not write, or its package is missing.
    """
    state = run_log(store, run.run_id).refresh()
    settled = state.newest.step if state.newest else 0
    memory = out / f"{run.run_id}.{to}.json"
    done = _done(memory)
    rows = [row for row in _rows(store, run.run_id, state.attempt) if done < row[0] <= settled]
    if not rows:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "to": to,
        "out": str(out),
        "project": sweep,
        "run": run.run_id,
        "settings": run.spec.model_dump_json(),
        "rows": rows,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "trainer.tracking"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip() or "the tracker failed").splitlines()[-1]
        raise OrchestrateError(f"{run.run_id}: {last}")
    temporary = memory.with_suffix(".tmp")
    temporary.write_text(json.dumps({"step": rows[-1][0]}))
    os.replace(temporary, memory)
    return len(rows)


def _rows(store: ObjectStore, run_id: str, newest_attempt: int) -> list[Row]:
    attempts = []
    for attempt in range(1, newest_attempt + 1):
        with contextlib.suppress(Unknown):  # it never came so far as to tell
            lines = read_lines(store, run_id, attempt=attempt, events=True)
            attempts.append([event for line in lines if isinstance(event := _event(line), dict)])
    return series(attempts)


def _event(line: str) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def _done(memory: Path) -> int:
    """The last step that was written; what cannot be read was not."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(memory.read_text())["step"])
    return 0
