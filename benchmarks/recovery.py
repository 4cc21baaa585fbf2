"""Seconds from a fault to the first new training step, and steps lost by it: ours beside Ray Tune.

    python benchmarks/recovery.py [--fault 'node killed']... [--save]     as root: every fault, on namespaces
    python benchmarks/recovery.py --local [--kills 3] [--save]            a killed node, on this machine's Ray

Both train the same run, with the trainer's own modules, on one Ray cluster of two worker nodes with one slot
each, so that the other node is free when the first is hit. Tune has ``max_failures=-1``, a folder for its
checkpoints and the same number of steps between them. Both see node deaths through the same health checks of
the cluster. It is checked that both resumed from a checkpoint, and that the steps trained twice had exactly
the same loss both times. Locally the two take turns, one kill each; a lost node is replaced before the next
turn. See ``recovery_faults`` for the other; its machines need ``tests/`` on PYTHONPATH.
"""

import json
import signal
import sys
import tempfile
from pathlib import Path

import click
from harness import RESULTS, BenchmarkFailed, conclude, run, show, verdict

GOAL = 1.0


@click.command()
@click.option("--fault", "faults", multiple=True, help="Only this one. May be repeated.")
@click.option("--local", is_flag=True, help="Only kills of a node, on a cluster on this machine.")
@click.option("--kills", type=click.IntRange(min=1), default=3, show_default=True, help="Of each, locally.")
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
def main(faults: tuple[str, ...], local: bool, kills: int, save: bool) -> None:
    if local or (reason := _why_no_machines()):
        if not local:
            print(f"only a killed node, on this machine's Ray: {reason}", file=sys.stderr)
        from recovery_local import kill_nodes

        kill_nodes(kills, save=save)
    else:
        inflict(faults, save=save)


def _why_no_machines() -> str | None:
    try:
        from support.namespaces import why_no_namespaces
    except ImportError:
        return "tests/ is not on PYTHONPATH"
    return why_no_namespaces()


def inflict(faults: tuple[str, ...], *, save: bool) -> None:
    """Every fault, or these, on machines of a network."""
    import recovery_faults

    if unknown := set(faults) - set(recovery_faults.NAMES):
        known = ", ".join(recovery_faults.NAMES)
        raise BenchmarkFailed(f"no fault {', '.join(sorted(unknown))}; there are {known}")
    signal.signal(signal.SIGTERM, lambda *about: sys.exit(143))  # the machines are removed all the same
    with tempfile.TemporaryDirectory(prefix="rec-", ignore_cleanup_errors=True) as scratch:
        figures = recovery_faults.measure(Path(scratch), faults or recovery_faults.NAMES)
    columns = ("detect_s", "again_s", "gap_s", "lost_steps")
    rows = []
    for fault, cost in figures["faults"].items():
        cells = [cost.get(who, {}).get(column) for who in ("ours", "ray_tune") for column in columns]
        shown = ["-" if cell is None else f"{cell:g}" for cell in cells]
        rows.append([fault, *shown, f"{cost['ratio']:.2f}" if "ratio" in cost else "-"])
    heads = ["detect", "again", "gap", "lost"]
    title = "seconds from the fault, and steps lost: ours, then Ray Tune; ratio: again"
    show(title, ["", *heads, *(f"Tune: {head}" for head in heads), "ratio"], rows)
    start_up_s = figures["start_up_s"]
    for fault, cost in figures["faults"].items():
        if "ratio" in cost:
            print(f"{fault}, ours / Ray Tune: {verdict(cost['ratio'], GOAL)}")
        if fault.startswith("notice") and "ours" in cost:
            gap_s, lost = cost["ours"]["gap_s"], cost["ours"]["lost_steps"]
            print(f"{fault}: {lost} steps lost; without training / start-up of {start_up_s:g} s: ", end="")
            print(verdict(gap_s / start_up_s, GOAL))
    if save and faults and (RESULTS / "recovery.json").exists():  # the other faults keep their figures
        kept = json.loads((RESULTS / "recovery.json").read_text())
        figures["faults"] = kept.get("faults", {}) | figures["faults"]
    conclude("recovery", figures, save=save)
    if failures := figures.get("failures"):
        raise BenchmarkFailed("; ".join(failures))


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
