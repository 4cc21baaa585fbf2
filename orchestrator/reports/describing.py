"""All that is settled about one run, in one place: spec, inputs, attempts, and how often it saves itself.

Read from the store alone, so it works without a cluster and after the sweep. What a trainer or a node wrote
is made safe to print.
"""

import json
from typing import Any

from storage.content.store import content_log
from storage.log import run_log
from storage.object_store import ObjectStore
from storage.records import Committed
from storage.redaction import printable, redacted
from storage.run_state import Attempt, RunState
from trainer.interval import MIN_S, UNMEASURED
from trainer.spec_inputs import inputs_of

from ..amounts import size_text
from ..errors import Unknown
from ..grid.schema import AUTO, Checkpoint
from ..grid.sweep import Sweep
from .trainer_logs import read_lines
from .view import described, status
from .why import NO_TIME, moment_of

Described = dict[str, Any]


def describe(store: ObjectStore, sweep: Sweep, run_id: str) -> Described:
    """Return the stable form of ``describe -o json``.

    Raises:
        StorageError
    """
    planned, state = sweep.run(run_id), run_log(store, run_id).refresh()
    spec = planned.spec
    return {
        "schema": 1,
        "run": run_id,
        "sweep": sweep.name,
        "store": store.url,
        "status": str(status(state)),
        "detail": _said(state.finished.detail) if state.finished else "",
        "params": planned.parameters,
        "step": state.committed_step,
        "max_steps": spec.max_steps,
        "node": _said(state.running.claimed.node) if state.running else None,
        "inputs": [_input(store, named.what, named.path, named.digest) for named in inputs_of(spec)],
        "checkpoint": {
            **sweep.checkpoint.model_dump(mode="json"),
            "interval": _interval(store, run_id, state, sweep.checkpoint),
        },
        "last_commit": _commit(state.newest) if state.newest else None,
        "attempts": [_attempt(attempt) for attempt in state.attempts],
        "spec": spec.model_dump(mode="json"),
    }


def text(found: Described) -> list[str]:
    """Return the same for a person to read."""
    steps = f"step {found['step']} of {found['max_steps']}"
    node = f" on {found['node']}" if found["node"] else ""
    lines = [
        f"run         {found['run']} ({described(found['params'])})" if found["params"] else found["run"],
        f"status      {found['status']}{node}, {steps} committed"
        + (f": {found['detail']}" * bool(found["detail"])),
        f"store       {found['store']}",
    ]
    for one in found["inputs"]:
        pinned = f"  sha256 {one['digest'][:12]}" if one["digest"] else "  not pinned"
        lines.append(f"{one['kind']:<11} {printable(one['path'])}{pinned}{_in_store(one)}")
    interval = found["checkpoint"]["interval"]
    lines.append(f"checkpoint  {interval['said']}")
    if commit := found["last_commit"]:
        size = size_text(commit["size_bytes"])
        lines.append(
            f"last commit step {commit['step']} (attempt {commit['attempt']}), {size}, {_at(commit['at'])}"
        )
    lines += [f"attempt {one['attempt']:<3} {_attempt_text(one)}" for one in found["attempts"]]
    lines += ["spec", *json.dumps(found["spec"], indent=2, ensure_ascii=True).splitlines()]
    return lines


def _input(store: ObjectStore, kind: str, path: str, digest: str | None) -> Described:
    stored = content_log(store, digest).refresh().readable if digest else None
    return {
        "kind": kind,
        "path": path,
        "digest": digest,
        "stored_bytes": stored.size_bytes if stored else None,
    }


def _interval(store: ObjectStore, run_id: str, state: RunState, checkpoint: Checkpoint) -> Described:
    policy = checkpoint.policy
    if policy.every_steps is not None:
        said = f"every {policy.every_steps} steps, as the sweep says"
        return {"every_steps": policy.every_steps, "every_s": None, "why": "", "said": said}
    every_s, why = policy.every_s, "as the sweep says"
    if checkpoint.every == AUTO:
        event = _last_interval(store, run_id, state)
        every_s, why = event if event else (MIN_S, UNMEASURED)
        if why == UNMEASURED and state.finished:
            why = "the run was over before the cost of a checkpoint was told"
        elif why == UNMEASURED and state.newest:
            why = "what a checkpoint costs is not told yet"
    return {"every_steps": None, "every_s": every_s, "why": why, "said": f"every {every_s:.0f} s: {why}"}


def _last_interval(store: ObjectStore, run_id: str, state: RunState) -> tuple[float, str] | None:
    """What the newest attempt last said of its interval."""
    if not state.attempts:
        return None
    try:
        lines = read_lines(store, run_id, attempt=state.attempt, events=True)
    except Unknown:
        return None
    for line in reversed(lines):
        if '"interval"' in line:
            try:
                event = json.loads(line)
                if event["event"] == "interval":
                    return float(event["every_s"]), _said(str(event["why"]))
            except (ValueError, KeyError, TypeError):
                continue
    return None


def _commit(committed: Committed) -> Described:
    return {
        "step": committed.step,
        "attempt": committed.attempt,
        "at": committed.at,
        "size_bytes": sum(file.size_bytes for file in committed.files),
        "metrics": committed.metrics,
        "final": committed.final,
    }


def _attempt(attempt: Attempt) -> Described:
    ended = attempt.ended
    return {
        "attempt": attempt.number,
        "node": _said(attempt.claimed.node),
        "claimed_at": attempt.claimed.at,
        "resumed_from": attempt.resumed_from,
        "committed_step": attempt.committed_step,
        "ended_at": ended.at if ended else None,
        "reason": str(ended.reason) if ended else None,
        "detail": _said(ended.detail) if ended else "",
    }


def _attempt_text(attempt: Described) -> str:
    committed = attempt["committed_step"]
    told = (
        f"on {attempt['node']} from {_at(attempt['claimed_at'])}, resumed from step {attempt['resumed_from']}"
    )
    told += f", committed step {committed}" if committed is not None else ", committed nothing"
    if attempt["reason"]:
        told += f"; {attempt['reason']} at {_at(attempt['ended_at'])}"
    return told + (f": {attempt['detail']}" if attempt["detail"] else "")


def _in_store(one: Described) -> str:
    stored = one["stored_bytes"]
    return "" if stored is None else f", in the store ({size_text(stored)})"


def _at(seconds: float) -> str:
    moment = moment_of(seconds)
    return moment.isoformat(sep=" ", timespec="seconds") if moment else NO_TIME


def _said(text: str) -> str:
    return redacted(printable(text))
