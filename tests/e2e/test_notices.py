"""A node of a real cluster is told of its end: nothing is lost, and its run goes on before it is gone."""

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster import running_cluster, wait_for
from support.evidence import adapter, litter, trained_alone
from support.gate import Gate

from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import Sweep, load
from orchestrator.launching import launch
from orchestrator.on_ray import local_ray
from orchestrator.reports.why import interruptions, why
from storage.log import run_log
from storage.records import EndReason, Outcome
from storage.url import open_store
from trainer.rundir import EXIT_PREEMPTED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 60
LEFT_S = 60
"""What the notice says; the node is killed once its run goes on elsewhere."""


def test_a_noticed_node_loses_nothing_and_is_replaced_before_it_is_gone(
    world: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    gate = Gate(tmp_path)
    sweep = plan(world, tmp_path, gate)
    store = open_store(sweep.storage.url)
    run_id = sweep.runs[0].run_id
    log = run_log(store, run_id)
    with (
        trained_alone(sweep.runs[0].spec, tmp_path) as calm,
        running_cluster(tmp_path / "home", nodes=2, cpus=1) as cluster,
    ):
        submit(sweep, store)
        launch.start(sweep, sweep.storage.url, arbitrated=False)
        wait_for("committed work", lambda: log.refresh().committed_step > 0, 120)
        first = log.state.attempts[0].claimed.node
        raylet = cluster.raylet_pids[first]
        noticed_at = time.time()
        (tmp_path / f"notice-{raylet}").write_text(f"{LEFT_S}\n")
        wait_for(
            "a replacement that trains", lambda: len(a := log.refresh().attempts) > 1 and a[1].started, 120
        )
        assert psutil.pid_exists(raylet)
        local_ray.kill_node(cluster, first)
        gate.open()
        wait_for("the end", lambda: log.refresh().finished, 120)
        expected = calm()

    state = log.state
    first_end = state.attempts[0].ended
    assert first_end is not None
    assert (first_end.reason, first_end.exit_code) == (EndReason.SPOT_NOTICE, EXIT_PREEMPTED)
    assert first_end.saved_s is not None
    assert state.outcome is Outcome.SUCCEEDED
    assert len(state.attempts) == 2
    assert state.attempts[1].claimed.node != first
    (cut,) = interruptions(state)
    assert cut.lost_steps == 0
    assert "lost 0 steps" in why(state, STEPS)
    assert litter(store, run_id, state) == []
    assert adapter(store, run_id, tmp_path / "noticed") == expected
    figures["notice_lost_steps"] = cut.lost_steps
    figures["notice_saved_s"] = round(first_end.saved_s, 2)
    started = state.attempts[1].started
    assert started is not None
    figures["notice_to_training_again_s"] = round(started.at - noticed_at, 1)


def plan(world: Path, folder: Path, gate: Gate) -> Sweep:
    """A run that learns of its node's end by a program, which tells two nodes of one machine apart."""
    tell = f"cat {folder}/notice-$(awk '/^PPid:/ {{print $2}}' /proc/$PPID/status)"
    file = folder / "grid.yaml"
    file.write_text(f"""
name: noticed
parameters: {{seed: {{values: [0]}}}}
base: {{model: {world / "base"}, resolution: 32, max_train_steps: {STEPS}, train_batch_size: 2, rank: 4,
  gradient_accumulation_steps: 2, lora_dropout: 0.1, learning_rate: 1e-3, optimizer: adamw}}
dataset: {{path: {world / "images"}, val_fraction: 0.2, caption_dropout: 0.2}}
storage: {{url: "file://{folder / "store"}"}}
resources:
  gpus: 0
  notices:
    command: [sh, -c, "{tell}"]
checkpoint: {{every: 7, grace_s: 1}}
recovery: {{max_failures: 5, backoff_s: 0.1, max_backoff_s: 0.2}}
{gate.grid}""")
    return load(file)
