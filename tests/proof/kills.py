"""Every method of training, killed at random moments and resumed, ends in the bytes of a run left alone.

    python -m proof.kills --kills 3 --seed 1      # the last line: {"methods": 17, "kills": 51, …}

Of each method one tiny run is left alone. Then the same run is lived again in processes that get a SIGKILL at
a moment drawn over the time which that took, from a process' beginning to the end of its export. The next
attempt resumes from the newest complete checkpoint, as the controller does, and finds the cache as the kill
left it. A run that is over before its kill begins anew, with nothing. Whenever a run is over, every file of
its final checkpoint and of its export must be the same. With ``--spoil`` attempts resume one step too late,
which must be found out.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from proof.methods import build_world, methods
from support.training import contents, lay_out

from storage.local import LocalCheckpoint, complete_checkpoints, staged_checkpoint
from trainer.config import RunSpec
from trainer.rundir import EXIT_COMPLETE, STATE, RunDir

TURNS = {
    "loading": "loading",
    "encoding": "encoding, first step",  # a run says that it trains once it has
    "drawing": "class images",
    "computing": "precompute",
    "training": "training",
    "exporting": "export",
}
"""What is under way, by the first word of the last such line of a run's log."""

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment: nothing of what libraries say when they are imported is about kills."""


@dataclass(slots=True)
class Life:
    """One run from its beginning to its end, in as many attempts as that takes."""

    folder: Path
    spec: RunSpec
    spoil: bool = False
    attempts: list[RunDir] = field(default_factory=list)

    @property
    def newest(self) -> LocalCheckpoint | None:
        """The newest complete checkpoint of all attempts."""
        found = (complete_checkpoints(run_dir.checkpoints) for run_dir in reversed(self.attempts))
        return next((newest for newest, *_ in filter(None, found)), None)

    @property
    def trained(self) -> bool:
        """Whether all that is left is its export. Such an attempt is left alone: most kills would hit it."""
        return self.newest is not None and self.newest.final

    def attempt(self, lasting_s: float | None) -> int:
        """Go on from where the last attempt was killed, for so long; return the exit code.

        Raises:
            AssertionError: The process left others behind.
        """
        newest, finished, resume = self.newest, None, None
        if newest and newest.final:
            finished = newest.path
        elif newest:
            resume = spoilt(newest, self.folder / "spoilt") if self.spoil else newest.path
        root = self.folder / f"attempt-{len(self.attempts)}"
        self.attempts.append(
            lay_out(root, self.spec, resume=resume, cache=self.folder / "cache", every_steps=1)
        )
        return _lived(root, finished, self.folder / "exported", lasting_s)

    def under_way(self) -> str:
        """What the newest attempt was about when it ended."""
        run_dir = self.attempts[-1]
        if list(run_dir.checkpoints.glob(".tmp-*")):
            return "checkpoint"
        lines = run_dir.log.read_text().splitlines() if run_dir.log.exists() else []
        turns = [TURNS[word] for line in lines if (word := line[20:].partition(" ")[0]) in TURNS]
        return turns[-1] if turns else "starting"

    def files(self) -> dict[str, bytes]:
        """What the run has delivered: its final checkpoint, and its export.

        What a kill has left under a temporary name is none of it.
        """
        assert self.newest
        assert self.newest.final
        exported = self.folder / "exported"
        names = (path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
        return contents(self.newest.path) | {
            f"exported/{name}": (exported / name).read_bytes() for name in names if name[0] != "."
        }


def _lived(root: Path, finished: Path | None, exported: Path, lasting_s: float | None) -> int:
    """Let a process live through an attempt, for so long at most; return its exit code."""
    from proof.mortal import attempt  # here: whoever started all this needs no torch

    # Forked from one that has imported everything, 6 s of work, and has never computed: it has no threads,
    # and an attempt costs what its training costs.
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(root, finished, exported))
    process.start()
    process.join(lasting_s)
    if process.is_alive():
        beside = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        left = [child for child in beside if child.is_running()]
        assert not left, f"the killed process left others behind: {left}"
    assert process.exitcode is not None
    return process.exitcode


def spoilt(checkpoint: LocalCheckpoint, folder: Path) -> Path:
    """Return a copy of a checkpoint that says it is one step further than it is."""
    step = checkpoint.step + 1
    with staged_checkpoint(folder, step, metrics=checkpoint.manifest.metrics, final=False) as staged:
        for file in checkpoint.manifest.files:
            shutil.copy(checkpoint.path / file.name, staged)
        progress = json.loads((staged / STATE).read_text())
        (staged / STATE).write_text(json.dumps(progress | {"step": step}))
    return complete_checkpoints(folder)[0].path


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Say of each file what is wrong with it."""
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    more = [f"{name} is there, and should not be" for name in found.keys() - expected.keys()]
    other = [f"{n} differs" for n in expected.keys() & found.keys() if expected[n] != found[n]]
    return sorted(missing + more + other)


@dataclass(slots=True)
class Tally:
    """What became of a method."""

    name: str
    took_s: float = 0.0
    kills: int = 0
    late: int = 0
    """Kills that came when the run was over."""
    during: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        killed = ", ".join(f"{count} in {turn}" for turn, count in sorted(self.during.items()))
        same = "; ".join(self.differences) or "the same bytes"
        return f"{self.name}: {self.took_s:.1f} s alone; killed {killed}; {self.late} late: {same}"


def prove(name: str, world: Path, folder: Path, *, kills: int, seed: int, spoil: bool) -> Tally:
    """Live a method's run undisturbed, and then until it was killed so many times."""
    chance, spec, tally = random.Random(f"{seed} {name}"), methods(world)[name], Tally(name)
    calm, began = Life(folder / name / "calm", spec), time.monotonic()
    if calm.attempt(None) != EXIT_COMPLETE:
        tally.differences.append(f"it fails when it is left alone: {_last_words(calm)}")
        return tally
    tally.took_s, expected, lives = time.monotonic() - began, calm.files(), 0
    while tally.kills < kills and not tally.differences:
        life = Life(folder / name / f"life-{lives}", spec, spoil)
        while (code := _next(life, chance, tally, kills)) == -signal.SIGKILL:
            pass
        if code == EXIT_COMPLETE:
            tally.differences += differences(expected, life.files())
        else:
            tally.differences.append(f"an attempt ended with code {code}: {_last_words(life)}")
        shutil.rmtree(life.folder)
        lives += 1
    shutil.rmtree(folder / name)
    return tally


def _next(life: Life, chance: random.Random, tally: Tally, kills: int) -> int:
    """Live through another attempt, count what killed it, and return its exit code."""
    # Early moments more often: an attempt that resumes has less to do, and what comes too late kills nobody.
    lasting_s = chance.triangular(0, tally.took_s, 0) if tally.kills < kills and not life.trained else None
    code = life.attempt(lasting_s)
    if code == -signal.SIGKILL:
        tally.kills += 1
        tally.during[life.under_way()] += 1
    elif lasting_s is not None:
        tally.late += 1
    return code


def _last_words(life: Life) -> str:
    return " / ".join(life.attempts[-1].log.read_text().splitlines()[-3:])


def main() -> int:
    names = list(methods(Path()))
    parser = argparse.ArgumentParser(prog="proof.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=3, help="of each method")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", action="append", choices=names, help="only this one; again for more")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="methods at a time")
    parser.add_argument("--spoil", action="store_true", help="resume one step too late: must be found out")
    chosen = parser.parse_args()
    os.environ.update(QUIET, OMP_NUM_THREADS="1")  # who has threads must not fork
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["proof.mortal"])
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        world, lives = Path(temporary, "world"), Path(temporary, "lives")
        building = server.Process(target=build_world, args=(world,))
        building.start()
        building.join()
        asked = partial(
            prove, world=world, folder=lives, kills=chosen.kills, seed=chosen.seed, spoil=chosen.spoil
        )
        with ProcessPoolExecutor(chosen.processes, mp_context=server) as pool:
            proving = as_completed([pool.submit(asked, name) for name in chosen.method or names])
            tallies = [_told(done.result()) for done in proving]
    different = sum(bool(tally.differences) for tally in tallies)
    figures = {
        "methods": len(tallies),
        "kills": sum(tally.kills for tally in tallies),
        "late": sum(tally.late for tally in tallies),
        "during": dict(sorted(sum((tally.during for tally in tallies), Counter[str]()).items())),
        "differences": different,
        "seed": chosen.seed,
    }
    print(json.dumps(figures))
    return 1 if different else 0


def _told(tally: Tally) -> Tally:
    print(f"{time.strftime('%H:%M:%S')} {tally}", file=sys.stderr, flush=True)
    return tally


if __name__ == "__main__":
    sys.exit(main())
