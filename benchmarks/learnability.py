"""Does each adapter and each objective learn? On the digits world, with a classifier as judge.

    python benchmarks/learnability.py [--seeds 3] [--only NAME …] [--save] [--keep FOLDER]

Every row but one teaches the nine, which the base model has never seen, with ``examples/digits``' own data,
prompts and judge, and differs from plain LoRA in what its name says. ``score`` is the harmonic mean of two
shares: of the nines that are recognised (``new``), and of the other prompts that still give their digit
(``others``). ``control`` is the same figure of the same base and prompts without any training. Runs of all
rows and seeds, each in a process of its own with one thread; seconds and memory are of that process, with
its start, samples and judge.

For x0 and v prediction the base is first taught to predict that: see ``taught_base.py``.

It holds if every row's mean score lies above its control by ``MARGIN``, but for those of ``MAY_FAIL``, and if
prior preservation keeps more of the old digits than the same run without it.
"""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
from harness import DIGITS, BenchmarkFailed, conclude, run, show
from learnability_rows import MAY_FAIL, ROWS, WITHOUT_PRIOR, Asked, asked_by

MARGIN = 0.25
TABLE = Path(__file__).resolve().parents[1] / "docs" / "learnability.md"


class Outcome(NamedTuple):
    """Of one run, or of an untrained base."""

    score: float
    new: float
    others: float
    seconds: float = 0.0
    memory_mb: float = 0.0
    file_bytes: int = 0


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="Only these rows.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True)
@click.option(
    "--save", is_flag=True, help="Keep the figures under benchmarks/results/ and the table in docs/."
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Leave each run's outcome there, and go on from what is there.",
)
def main(seeds: int, steps: int, only: tuple[str, ...], jobs: int, save: bool, keep: Path | None) -> None:
    names = [name for name in ROWS if not only or name in only]
    with contextlib.ExitStack() as stack:
        scratch = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="learnability-")))
        bases = _bases(scratch, names)
        # "spawn": a forked process inherits the threads' locks of torch, and the memory of its parent.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            controls = {
                asked: pool.submit(_once, _control, (bases[asked.taught], asked), scratch / asked.folder)
                for asked in sorted({asked_by(name) for name in names})
            }
            runs = {
                (name, seed): pool.submit(
                    _once,
                    _train,
                    (name, _spec(name, seed, steps, bases)),
                    scratch / _folder(name, steps, seed),
                )
                for seed in range(seeds)
                for name in names
            }
            for (name, seed), outcome in runs.items():
                print(f"{name}, seed {seed}: {outcome.result()}", file=sys.stderr)
        rows = [
            _row(
                name,
                [runs[name, seed].result() for seed in range(seeds)],
                controls[asked_by(name)].result(),
            )
            for name in names
        ]
    _show(rows, seeds, steps)
    figures = {"seeds": seeds, "steps": steps, "rows": rows, "holds": not (failed := _failures(rows))}
    if save:
        _write_table(rows, seeds, steps)
    conclude("learnability", figures, save=save)
    if failed:
        raise BenchmarkFailed("; ".join(failed))


def _bases(scratch: Path, names: list[str]) -> dict[str, Path]:
    """Return a base model for each prediction type that the rows need."""
    bases = {"epsilon": DIGITS / "base"}
    script = Path(__file__).with_name("taught_base.py")
    for taught in sorted({ROWS[name][1].get("taught", "epsilon") for name in names} - {"epsilon"}):
        bases[taught] = scratch / taught
        if bases[taught].exists():
            continue
        print(f"teaching the base model {taught} (two minutes or so)", file=sys.stderr)
        new = scratch / f"{taught}.tmp"
        subprocess.run([sys.executable, str(script), taught, str(new)], check=True)
        new.rename(bases[taught])
    return bases


def _folder(name: str, steps: int, seed: int) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{steps}-{seed}"


def _once(measure: Callable[[Any, Path], Outcome], given: Any, folder: Path) -> Outcome:
    """Measure in a folder, unless its outcome lies beside it already."""
    kept = folder.with_name(f"{folder.name}.json")
    if kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    for cut_off in (folder, folder.with_name(f"{folder.name}-nines")):
        shutil.rmtree(cut_off, ignore_errors=True)
    outcome = measure(given, folder)
    new = kept.with_suffix(".tmp")
    new.write_text(json.dumps(outcome._asdict()))
    new.rename(kept)
    return outcome


def _spec(name: str, seed: int, steps: int, bases: dict[str, Path]) -> dict[str, Any]:
    change = ROWS[name][1]
    base = {
        "model": str(bases[change.get("taught", "epsilon")]),
        "resolution": 32,
        "max_train_steps": steps,
        "train_batch_size": 16,
        "learning_rate": 1e-3,
        "seed": seed,
    }
    if "adapter" in change.get("base", {}).get("train", "adapter"):
        base["rank"] = 8
    spec: dict[str, Any] = {
        "base": {**base, **change.get("base", {})},
        "dataset": {"path": str(DIGITS / "nines"), **change.get("dataset", {})},
        "samples": asked_by(name).samples,
    }
    return spec | ({"prior": change["prior"]} if "prior" in change else {})


def _train(given: tuple[str, dict[str, Any]], folder: Path) -> Outcome:
    """Train, draw and judge one run in this process."""
    from storage.local import complete_checkpoints
    from trainer.attempt import run_attempt
    from trainer.config import RunSpec
    from trainer.export.checkpoint import Wanted, export_checkpoint
    from trainer.rundir import EXIT_COMPLETE, CheckpointPolicy, Options, RunDir, StartOrder
    from trainer.stop import Stop

    began = time.monotonic()
    asked, spec = asked_by(given[0]), given[1]
    checked = RunSpec.model_validate_json(json.dumps(_with_word(spec, asked, folder)))
    run_dir = RunDir(folder)
    run_dir.checkpoints.mkdir(parents=True)
    run_dir.spec.write_text(checked.model_dump_json())
    options = Options(
        threads=1, cache_dir=str(folder.parent / "cache"), checkpoint=CheckpointPolicy(every_s=None)
    )
    run_dir.options.write_text(options.model_dump_json())
    run_dir.order_start(StartOrder(resume=None))
    with (folder / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        if (code := run_attempt(run_dir, Stop())) != EXIT_COMPLETE:
            raise BenchmarkFailed(f"{folder}: exit code {code}")
    took_s = time.monotonic() - began
    (samples,) = run_dir.samples.iterdir()
    judged = _judged(samples, asked)
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wanted = Wanted(to="diffusers" if "full" in checked.base.train else "kohya", name="x")
    export_checkpoint(complete_checkpoints(run_dir.checkpoints)[0].path, checked, folder / "x", wanted)
    file_bytes = sum(path.stat().st_size for path in (folder / "x").rglob("*") if path.is_file())
    return judged._replace(seconds=took_s, memory_mb=memory_mb, file_bytes=file_bytes)


def _with_word(spec: dict[str, Any], asked: Asked, folder: Path) -> dict[str, Any]:
    """Let captions say the word that a run teaches."""
    if asked.said == asked.digit:
        return spec
    sys.path.insert(0, str(DIGITS))
    import world

    images = folder.parent / f"{folder.name}-nines"
    world.write_dataset(images, world.WORDS.index(asked.digit), 128)
    (images / "metadata.jsonl").unlink()
    return spec | {"dataset": {"path": str(images), "caption": f"a handwritten {asked.said}"}}


def _control(given: tuple[Path, Asked], folder: Path) -> Outcome:
    """Draw and judge the base itself."""
    from trainer.config import RunSpec
    from trainer.randomness import make_deterministic
    from trainer.sample import sample_images

    make_deterministic(1)
    base, asked = given
    spec = {
        "base": {"model": str(base), "resolution": 32},
        "dataset": {"path": str(DIGITS / "nines")},
        "samples": asked.samples,
    }
    return _judged(sample_images(RunSpec.model_validate_json(json.dumps(spec)), None, folder), asked)


def _judged(samples: Path, asked: Asked) -> Outcome:
    """Return the shares of images that are what their prompts name, as ``examples/digits/score.py`` does."""
    sys.path.insert(0, str(DIGITS))
    import score
    import world
    from PIL import Image

    judge = score.Judge()
    right: dict[bool, list[bool]] = {True: [], False: []}
    for entry in json.loads((samples / "index.json").read_text()):
        is_taught = asked.said in entry["prompt"]
        wanted = world.WORDS.index(asked.digit) if is_taught else world.digit_of(entry["prompt"])
        with Image.open(samples / entry["file"]) as image:
            right[is_taught].append(judge.digit(image) == wanted)
    new, others = (sum(right[kind]) / len(right[kind]) for kind in (True, False))
    return Outcome(score.harmonic_mean(new, others), new, others)


def _row(name: str, outcomes: list[Outcome], control: Outcome) -> dict[str, Any]:
    mean = Outcome(*(statistics.fmean(values) for values in zip(*outcomes, strict=True)))
    return {
        "name": name,
        "kind": ROWS[name][0],
        "score": round(mean.score, 3),
        "control": round(control.score, 3),
        "new": round(mean.new, 3),
        "others": round(mean.others, 3),
        "others_control": round(control.others, 3),
        "scores": [round(outcome.score, 3) for outcome in outcomes],
        "seconds": round(mean.seconds, 1),
        "memory_mb": round(mean.memory_mb),
        "file_bytes": round(mean.file_bytes),
    }


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    found = [
        f"{row['name']}: score {row['score']}, control {row['control']}"
        for row in rows
        if row["score"] < row["control"] + MARGIN and row["name"] not in MAY_FAIL
    ]
    by_name = {row["name"]: row for row in rows}
    if without := by_name.get(WITHOUT_PRIOR):
        found += [
            f"{row['name']}: {row['others']} of the old digits are left, {without['others']} without prior"
            for row in rows
            if row["kind"] == "DreamBooth" and row is not without and row["others"] <= without["others"]
        ]
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    spread = f"{min(row['scores']):.2f}–{max(row['scores']):.2f}"
    return [
        row["name"],
        f"{row['score']:.2f}",
        spread,
        f"{row['control']:.2f}",
        f"{row['new']:.2f}",
        f"{row['others']:.2f}",
        f"{row['seconds']:.0f}",
        f"{row['memory_mb']}",
        f"{row['file_bytes'] / 1000:.0f}",
    ]


COLUMNS = ("", "score", "seeds", "control", "new", "others", "s", "MB", "file, kB")


def _show(rows: list[dict[str, Any]], seeds: int, steps: int) -> None:
    show(f"{steps} steps, mean of {seeds} seeds", COLUMNS, [_cells(row) for row in rows])


def _write_table(rows: list[dict[str, Any]], seeds: int, steps: int) -> None:
    """Replace the table in ``docs/learnability.md``, between its two marks."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    before, begin, rest = TABLE.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not begin or not end:
        raise BenchmarkFailed(f"{TABLE} has no place for the table")
    said = f"{steps} steps at batch 16, the mean of {seeds} seeds.\n\n"
    TABLE.write_text(before + begin + said + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    run(lambda: main(standalone_mode=False))
