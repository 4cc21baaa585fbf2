"""The contract between a training process and whoever supervises it: files, signals, exit codes.

    <run directory>/
      spec.json        the RunSpec
      options.json     Options: what does not change the result
      start.json       appears by rename once the checkpoint to resume from is there: StartOrder
      resume/          that checkpoint
      interval.json    seconds between checkpoints, replaced by rename when they change: see ``pacing``
      stop.json        appears by rename before SIGTERM: until when, by the monotonic clock of this machine
      checkpoints/     step-000000100/ appears by rename, complete, with a manifest.json
      samples/         step-000000100/ appears by rename: images and index.json
      out/             all that a foreign command writes, see ``trainer.command``
      events.jsonl     one JSON object a line, see Event
      alive            touched in long work between two events; only its time means anything
      log.txt          stdout and stderr

The training process is started as ``python -m trainer.process``, reads one line from stdin, the run
directory, and kills its own process group when stdin reaches its end: it cannot outlive its supervisor.
SIGTERM means: finish the step if there is time, checkpoint, exit 75; SIGUSR1: write the stacks of all threads
into the log.
Imports no torch.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from storage.local import DISK_FULL
from storage.records import EndReason

from .config import Frozen
from .interval import Lifetimes

EXIT_COMPLETE = 0
"""The final checkpoint is written."""
EXIT_PREEMPTED = 75
"""Asked to stop; state saved."""
EXIT_BAD_CONFIG = 78
"""No retry can help: the spec, the data or the base model are wrong."""
EXIT_BAD_CHECKPOINT = 65
"""The checkpoint to resume from cannot be used; an earlier one may."""

EXIT_DISK_FULL = 73
"""The node's disk has no room for a checkpoint, and nobody made any; or it cannot be written at all."""

EXIT_UNFIT = 71
"""Said before anything was tried: this node cannot train now, its GPU or disk does not work."""

GPU_CHECK = "TRAINER_GPU_CHECK"
"""Environment variable of the process: the file for what it finds out about its GPU. Without it, nothing."""
GPU_WORKS = "ok"

EXIT_HUB_UNREACHABLE = 68
"""The base model is on a hub that did not answer."""

EXIT_STORE_UNREACHABLE = 69
"""Said by the supervisor: what the attempt needed, or had saved, did not get from or to the store."""

ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
"""The files of a checkpoint, see ``snapshot``."""
SALVAGE = frozenset({ADAPTER, STATE})
"""What is worth saving of a checkpoint for which there is no time: nothing can resume from it."""

EVENTS_FILE = "events.jsonl"
LOG_FILE = "log.txt"


def end_reason(code: int) -> EndReason:
    """What an attempt's exit code alone, negative for a signal, says about why it ended: see ``evidence``."""
    if code < 0:
        return EndReason.KILLED
    return {
        EXIT_PREEMPTED: EndReason.DRAINED,
        EXIT_BAD_CHECKPOINT: EndReason.CKPT_INVALID,
        EXIT_BAD_CONFIG: EndReason.BAD_CONFIG,
        EXIT_STORE_UNREACHABLE: EndReason.STORAGE_DOWN,
        EXIT_HUB_UNREACHABLE: EndReason.HUB_DOWN,
        EXIT_DISK_FULL: EndReason.DISK_FULL,
        EXIT_UNFIT: EndReason.NODE_UNFIT,
    }.get(code, EndReason.APP_ERROR)


class CheckpointPolicy(Frozen):
    """When a run saves itself. Whichever of steps and seconds comes first."""

    every_steps: int | None = Field(default=None, ge=1)
    every_s: float | None = Field(default=120.0, gt=0)
    auto_max_s: float | None = Field(default=None, gt=0)
    """Set: the supervisor decides ``every_s`` anew from what it measures, up to this; see ``interval``."""


class Options(Frozen):
    """How this attempt runs, on this node.

    None of it changes what the run sees or how it is weighed. ``threads``, ``micro_batch`` and ``processes``
    decide the order of sums, and so the last bits.
    """

    checkpoint: CheckpointPolicy = CheckpointPolicy()
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch. Sums are split by thread, so runs are bit-identical only at an equal number."""
    micro_batch: int | None = Field(default=None, ge=1)
    """The most images of one forward pass; None: ``base.train_batch_size``."""
    processes: int = Field(default=1, ge=1)
    """How many processes compute the run together, see ``ranks``: one to a GPU."""
    cache_dir: str | None = None
    """Where latents, text embeddings, hub files and fetched content are kept on this node."""
    content: dict[str, str] = Field(default_factory=dict)
    """Copies of datasets and base models on this node, verified, by digest; see ``trainer.inputs``."""
    stall_timeout_s: float | None = Field(default=600.0, gt=0)
    """Seconds without any sign of progress after which the process hangs and is killed; None: never."""
    lifetimes: Lifetimes = Lifetimes()
    """How long nodes of this kind live, as the sweep has seen it."""


class StartOrder(Frozen):
    """What the process waits for before its first step."""

    resume: str | None
    """Directory of a verified checkpoint, relative to the run directory; None: from the beginning."""


def cache_folder(options: Options) -> Path:
    """Where a node keeps what it can compute or fetch again."""
    return Path(options.cache_dir).expanduser() if options.cache_dir else Path.home() / ".cache/orchestrate"


class RunDir:
    """Paths of one run directory, and the few files both sides read and write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = root / "spec.json"
        self.options = root / "options.json"
        self.start = root / "start.json"
        self.stop = root / "stop.json"
        self.resume = root / "resume"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"
        self.events = root / EVENTS_FILE
        self.interval = root / "interval.json"
        self.log = root / LOG_FILE
        self.alive = root / "alive"

    def remove(self) -> None:
        """Remove it with all that is in it; never raises.

        It gets another name first: what a thread that is still at work in it makes would else be left.
        """
        doomed = self.root.with_name(f".removed-{self.root.name}")
        with contextlib.suppress(OSError):
            self.root.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def order_start(self, order: StartOrder) -> None:
        """Release the waiting process."""
        temporary = self.start.with_suffix(".tmp")
        temporary.write_text(order.model_dump_json())
        os.replace(temporary, self.start)

    def order_stop(self, by: float) -> None:
        """Tell how long a stopped process may live. On a full disk it does not learn of it."""
        with contextlib.suppress(OSError):
            temporary = self.stop.with_suffix(".tmp")
            temporary.write_text(json.dumps(by))
            os.replace(temporary, self.stop)

    def left_s(self, now: float) -> float | None:
        """Return the seconds until a process that was asked to stop is killed; None: nobody said."""
        try:
            return float(self.stop.read_text()) - now
        except (OSError, ValueError):
            return None


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one event.

    ``started step checkpoint interval validation samples score disk_full preempted complete error``

    ``started`` carries ``step`` (resumed from); ``step`` carries ``step``, ``loss``, ``lr``, ``step_s``,
    ``first_sample`` (global index) and ``samples`` (how many);
    ``checkpoint`` carries ``step``, ``stall_s``, ``write_s``, ``inflation_s``; ``interval`` carries
    ``every_s``, ``why``; ``error`` carries ``type``, ``message``, ``hint``, ``memory_bytes``.
    One write of one line: a reader never sees two lines mixed. On a full disk the event is lost: a run must
    not end for want of something to tell.
    """
    line = json.dumps({"event": event, **fields}, allow_nan=True) + "\n"
    try:
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the line, event) for each complete line from ``offset`` on.

    A line that is no event, as a full disk leaves them, is passed over.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield offset, event
