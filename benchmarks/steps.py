"""Seconds per step and fixed cost per run: ours beside diffusers' own ``train_text_to_image_lora.py``.

    python benchmarks/steps.py --diffusers-script PATH [--repeats 4] [--save]

The script lies in diffusers' repository under ``examples/text_to_image/``; it is run as it is, with the
libraries of this environment and ``datasets``. Same base model, images, resolution, batch size, rank,
optimizer and number of threads. Whole processes are timed, from start to exit, for a short and a long run:
the difference gives the seconds per step, what is left is the fixed cost. Ours is timed as ``python -m
trainer run`` and with a warm spare process, which is how an agent starts every run. Each tool keeps what it
caches in a folder that the first run fills; that first run is shown apart. The contenders take turns, and the
fastest run of each counts: whatever else the machine does can only add. The CPU seconds are shown as well,
which depend less on that.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil
from harness import DIGITS, BenchmarkFailed, conclude, digits_spec, run, show, verdict, wait_until_warm

from storage.log import run_log
from storage.records import Claimed
from storage.url import open_store
from trainer.rundir import CheckpointPolicy, Options
from trainer.supervisor import Assignment, Supervisor
from trainer.training_process import TrainingProcess

STEP_GOAL = 1.0
START_GOAL = 0.5
RUN_SCRIPT = Path(__file__).resolve().parent / "run_script.py"
INCARNATION = "0" * 8


class Cost(NamedTuple):
    """Of one run, in seconds."""

    wall: float
    cpu: float
    """Of all its processes."""


Contender = Callable[[int], Cost]
"""Trains so many steps."""


@click.command()
@click.option("--diffusers-script", "script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--short", type=click.IntRange(min=1), default=2, show_default=True, help="Steps.")
@click.option("--long", type=click.IntRange(min=2), default=122, show_default=True, help="Steps.")
@click.option("--repeats", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--save", is_flag=True, help="Keep the figures under benchmarks/results/.")
def main(script: Path | None, short: int, long: int, repeats: int, save: bool) -> None:
    if short >= long:
        raise BenchmarkFailed(f"--long must be more than --short, got {long} and {short}")
    with tempfile.TemporaryDirectory(prefix="steps-") as scratch:
        bench = _Bench(Path(scratch), script)
        first = {name: contender(short) for name, contender in bench.contenders.items()}
        times = _timed(bench.contenders, (short, long), repeats)
    figures: dict[str, Any] = {}
    for name in bench.contenders:
        figures |= _figures(name, times, short, long)
        figures[f"{name}_first_s"] = round(first[name].wall - short * figures[f"{name}_step_s"], 3)
    _show(figures, list(bench.contenders), short, long, repeats)
    if script is None:
        print("compared with nothing: give --diffusers-script PATH/train_text_to_image_lora.py")
    else:
        figures["step_ratio"] = round(figures["ours_step_s"] / figures["diffusers_step_s"], 3)
        figures["start_ratio"] = round(figures["ours_start_s"] / figures["diffusers_start_s"], 3)
        figures["warm_start_ratio"] = round(figures["ours_warm_start_s"] / figures["diffusers_start_s"], 3)
        figures["step_cpu_ratio"] = round(figures["ours_step_cpu_s"] / figures["diffusers_step_cpu_s"], 3)
        figures["start_cpu_ratio"] = round(figures["ours_start_cpu_s"] / figures["diffusers_start_cpu_s"], 3)
        print(f"seconds per step, ours / diffusers: {verdict(figures['step_ratio'], STEP_GOAL)}")
        print(f"fixed cost, ours / diffusers: {verdict(figures['start_ratio'], START_GOAL)}")
        print(f"fixed cost, ours warm / diffusers: {verdict(figures['warm_start_ratio'], START_GOAL)}")
    conclude("steps", figures, save=save and script is not None)


class _Bench:
    """The contenders, in a folder of their own: home, store, outputs."""

    def __init__(self, scratch: Path, script: Path | None) -> None:
        self._scratch = scratch
        self._script = script
        self._runs = 0
        home = scratch / "home"
        home.mkdir()
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RAY_"))},
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.contenders: dict[str, Contender] = {"ours": self._cold, "ours_warm": self._warm}
        if script:
            self.contenders["diffusers"] = self._diffusers

    def _cold(self, steps: int) -> Cost:
        spec = self._scratch / f"spec-{steps}.json"
        spec.write_text(digits_spec(steps).model_dump_json())
        name = self._name()
        arguments = ["--spec", str(spec), "--store", self._store_url, "--run-id", name, "--threads", "1"]
        cost = self._process([sys.executable, "-m", "trainer", "run", *arguments])
        self._check(name, steps)
        return cost

    def _warm(self, steps: int) -> Cost:
        """What an agent does with a run that it was given."""
        name = self._name()
        store = open_store(self._store_url, check_then_put=True)
        spare = _started(self._environment)
        try:
            wait_until_warm(spare.pid)
            importing_s = sum(psutil.Process(spare.pid).cpu_times()[:2])
            began, used_s = time.perf_counter(), _cpu_s()
            log = run_log(store, name)
            log.append(Claimed(attempt=1, incarnation=INCARNATION, node="here", slot="here", at=time.time()))
            supervisor = Supervisor(
                store,
                Assignment(run_id=name, attempt=1, incarnation=INCARNATION),
                digits_spec(steps),
                Options(
                    checkpoint=CheckpointPolicy(),
                    threads=1,
                    cache_dir=str(self._scratch / "home" / ".cache" / "orchestrate"),
                ),
                scratch=self._scratch / "attempts",
                ledger=log,
                process=spare,
            )
            final = supervisor.run()
            took_s = time.perf_counter() - began
        finally:
            spare.kill()
        if final.exit_code != 0:
            raise BenchmarkFailed(f"{name} ended with code {final.exit_code}: {final.error}")
        self._check(name, steps)
        return Cost(wall=took_s, cpu=_cpu_s() - used_s - importing_s)

    def _diffusers(self, steps: int) -> Cost:
        out = self._scratch / self._name()
        arguments = {
            "pretrained_model_name_or_path": DIGITS / "base",
            "train_data_dir": DIGITS / "nines",
            "caption_column": "text",
            "resolution": 32,
            "train_batch_size": 16,
            "rank": 8,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "mixed_precision": "no",
            "max_train_steps": steps,
            "seed": 0,
            "output_dir": out,
        }
        words = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
        cost = self._process([sys.executable, str(RUN_SCRIPT), str(self._script), *words, "--center_crop"])
        if not (out / "pytorch_lora_weights.safetensors").exists():
            raise BenchmarkFailed(f"{self._script} wrote no LoRA")
        return cost

    @property
    def _store_url(self) -> str:
        return f"file://{self._scratch / 'store'}"

    def _name(self) -> str:
        self._runs += 1
        return f"run-{self._runs}"

    def _process(self, command: list[str]) -> Cost:
        began, used_s = time.perf_counter(), _cpu_s()
        done = subprocess.run(
            command, env=self._environment, cwd=self._scratch, capture_output=True, text=True, check=False
        )
        cost = Cost(wall=time.perf_counter() - began, cpu=_cpu_s() - used_s)
        if done.returncode != 0:
            raise BenchmarkFailed(
                f"{' '.join(command[:4])} exited with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return cost

    def _check(self, run_id: str, steps: int) -> None:
        state = run_log(open_store(self._store_url), run_id).refresh()
        if state.result is None or state.result.step != steps:
            raise BenchmarkFailed(f"{run_id} committed no result of {steps} steps")


def _started(environment: dict[str, str]) -> TrainingProcess:
    """Start a spare process with that environment, which it takes from ours."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        return TrainingProcess()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _cpu_s() -> float:
    """CPU seconds so far of this process and of the children that it has waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, whose))


def _timed(
    contenders: dict[str, Contender], lengths: tuple[int, ...], repeats: int
) -> dict[tuple[str, int], list[Cost]]:
    times: dict[tuple[str, int], list[Cost]] = defaultdict(list)
    for _ in range(repeats):
        for steps in lengths:
            for name, contender in contenders.items():
                cost = contender(steps)
                times[name, steps].append(cost)
                print(f"{name}, {steps} steps: {cost.wall:.1f} s, CPU {cost.cpu:.1f} s", file=sys.stderr)
    return times


def _figures(name: str, times: dict[tuple[str, int], list[Cost]], short: int, long: int) -> dict[str, float]:
    """Seconds per step and what is left of a run, from the fastest run of each length."""
    figures = {}
    for kind in Cost._fields:
        few, many = (min(getattr(cost, kind) for cost in times[name, steps]) for steps in (short, long))
        step_s = (many - few) / (long - short)
        if step_s <= 0:
            raise BenchmarkFailed(
                f"{name}: {long} steps took {many:.1f} s, {short} took {few:.1f} s: give more --repeats"
            )
        suffix = "cpu_s" if kind == "cpu" else "s"
        figures[f"{name}_step_{suffix}"] = round(step_s, 4)
        figures[f"{name}_start_{suffix}"] = round(few - short * step_s, 3)
    return figures


def _show(figures: dict[str, Any], names: list[str], short: int, long: int, repeats: int) -> None:
    rows = [
        [
            name.replace("_", ", "),
            f"{figures[f'{name}_step_s']:.4f}",
            f"{1 / figures[f'{name}_step_s']:.1f}",
            f"{figures[f'{name}_step_cpu_s']:.4f}",
            f"{figures[f'{name}_start_s']:.2f}",
            f"{figures[f'{name}_start_cpu_s']:.2f}",
            f"{figures[f'{name}_first_s']:.2f}",
        ]
        for name in names
    ]
    title = f"from runs of {short} and {long} steps of 16 images, the fastest of {repeats}"
    show(title, ["", "s/step", "steps/s", "CPU", "fixed cost, s", "CPU", "first run's"], rows)


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
