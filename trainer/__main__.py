"""``python -m trainer``: one run without any cluster, and the conversions that need torch.

    python -m trainer run --spec run.json --store file:///srv/loras --run-id cat
    python -m trainer export --checkpoint DIR --spec run.json --out DIR --to diffusers
    python -m trainer sample --spec run.json [--checkpoint DIR] --out DIR
    python -m trainer generate --adapter FILE --prompt TEXT --out DIR
    python -m trainer plan --spec run.json
    python -m trainer lora TOOL …

``run`` claims the run's next attempt in its log, so that killing it and starting it again resumes it, here or
on another machine, exactly as the orchestrator would.
"""

import contextlib
import json
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from storage import layout
from storage.errors import Fenced, StorageError
from storage.ledger import append_until_said
from storage.object_store import ObjectStore
from storage.probe import open_probed as open_and_probe
from storage.records import (
    Claimed,
    Ended,
    EndReason,
    Finished,
    Outcome,
    Quarantined,
    Record,
)
from storage.run_state import RunState
from storage.snapshots import hinted_log

from .config import RunSpec
from .errors import TrainerError
from .evidence import attributed
from .rundir import (
    EXIT_BAD_CHECKPOINT,
    EXIT_BAD_CONFIG,
    EXIT_COMPLETE,
    CheckpointPolicy,
    Options,
)
from .supervisor import Assignment, Progress, Supervisor
from .weights.running import lora

if TYPE_CHECKING:
    from .export import Dtype
    from .export.bundle import Target
    from .export.headers import Amount

TARGETS = ("diffusers", "kohya", "comfyui", "a1111", "hf", "dir")
"""For whom an adapter is exported: see ``export.bundle``."""

spec_option = click.option(
    "--spec", "spec_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True)


class Commands(click.Group):
    """A group that tells what the trainer foresaw in one line, with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrainerError as error:
            click.echo(f"{error}; {error.hint}" if error.hint else str(error), err=True)
            sys.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, export or sample one run, or draw from an adapter, without a cluster."""


@main.command()
@spec_option
@click.option("--store", "store_url", required=True, help="s3://bucket/prefix?endpoint=… or file:///folder")
@click.option("--run-id", default="run", show_default=True, help="The run's name in the store.")
@click.option("--every-steps", type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option(
    "--every-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds between checkpoints; 120 if neither is given.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="The most images of one forward pass.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="One to a GPU, together."
)
@click.option("--grace-s", type=float, default=25.0, show_default=True, help="From SIGTERM to SIGKILL.")
def run(
    spec_path: Path,
    store_url: str,
    run_id: str,
    every_steps: int | None,
    every_s: float | None,
    threads: int | None,
    micro_batch: int | None,
    processes: int,
    grace_s: float,
) -> None:
    """Train one run to its end, resuming from its newest checkpoint in the store."""
    spec = _spec(spec_path)
    policy = CheckpointPolicy(every_steps=every_steps, every_s=every_s if every_s or every_steps else 120.0)
    options = Options(checkpoint=policy, threads=threads, micro_batch=micro_batch, processes=processes)
    try:
        layout.check_name("run", run_id)
        code = _run(open_probed(store_url), run_id, spec, options, grace_s)
    except StorageError as error:
        raise click.ClickException(f"{store_url}: {error}") from error
    sys.exit(code)


@main.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@spec_option
@out_option
@click.option("--to", type=click.Choice(TARGETS), default="diffusers", show_default=True)
@click.option("--name", help="What the adapter is called; by default as the folder.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--metadata", type=click.Choice(["minimal", "full", "none"]), default="minimal", show_default=True
)
@click.option("--samples", type=click.Path(exists=True, path_type=Path), help="The run's sample images.")
def export(
    checkpoint: Path,
    spec_path: Path,
    out: Path,
    to: "Target",
    name: str | None,
    dtype: "Dtype",
    metadata: "Amount",
    samples: Path | None,
) -> None:
    """Write what a checkpoint holds as others load it, verify it, and print where, and how it is called."""
    from .export.bundle import read_samples
    from .export.checkpoint import Wanted, export_checkpoint

    shown = read_samples(samples) if samples else []
    wanted = Wanted(to=to, name=name or out.name, dtype=dtype, metadata=metadata, samples=shown)
    exported = export_checkpoint(checkpoint, _spec(spec_path), out, wanted)
    for each in exported:
        click.echo(f"{each.path.name} verified: {json.dumps(each.found)}")
    if called := " ".join(dict.fromkeys(each.usage for each in exported if each.usage)):
        click.echo(f"in a prompt: {called}")
    click.echo(exported[0].path)


@main.command()
@click.option("--adapter", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--base", "model", help="A hub id or a local model, if not what the file says.")
@click.option("--spec", "spec_path", type=click.Path(exists=True, path_type=Path), help="Its run's spec.")
@click.option("--prompt", "prompts", multiple=True, required=True)
@click.option("--negative", default="")
@click.option("--seed", "seeds", type=int, multiple=True, default=(1,))
@click.option("--steps", type=click.IntRange(min=1), default=25)
@click.option("--cfg", type=click.FloatRange(min=0), default=7.0)
@click.option("--scale", type=float, default=0.8)
@click.option("--resolution", type=click.IntRange(min=8))
@out_option
def generate(
    adapter: Path,
    model: str | None,
    spec_path: Path | None,
    prompts: tuple[str, ...],
    negative: str,
    seeds: tuple[int, ...],
    steps: int,
    cfg: float,
    scale: float,
    resolution: int | None,
    out: Path,
) -> None:
    """Draw images from an adapter's file, and print theirs."""
    from .generate import Wish
    from .generate import generate as drawn

    spec = _spec(spec_path) if spec_path else None
    wish = Wish(
        prompts=prompts,
        negative=negative,
        seeds=seeds,
        steps=steps,
        cfg=cfg,
        scale=scale,
        resolution=resolution or (spec.base.resolution if spec else None),
        model=model,
        trigger=spec.dataset.trigger if spec else None,
    )
    for image in drawn(adapter, spec.base if spec else None, wish, out):
        click.echo(image)


@main.command()
@spec_option
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="Without it: the base model."
)
@out_option
def sample(spec_path: Path, checkpoint: Path | None, out: Path) -> None:
    """Draw the spec's sample images from a checkpoint, or from the base model."""
    from .sample import sample_images

    sample_images(_spec(spec_path), checkpoint, out)
    click.echo(out)


@main.command()
@spec_option
@click.option("--micro-batch", type=click.IntRange(min=1), help="The most images of one forward pass.")
@click.option("--runs-on-a-gpu", type=click.IntRange(min=1), default=1, help="How many such runs share one.")
@click.option("--hollow-below", type=float, metavar="GB", help="Find the cut with which training needs less.")
def plan(spec_path: Path, micro_batch: int | None, runs_on_a_gpu: int, hollow_below: float | None) -> None:
    """Tell what a run will need of a GPU's memory: from its base's configuration, without weights or GPU."""
    from .memory.estimate import estimate
    from .memory.hollow_cuts import cuts_until
    from .memory.plan import GB

    if hollow_below is not None:
        for line in cuts_until(_spec(spec_path), hollow_below * GB, micro_batch=micro_batch):
            click.echo(line)
        return
    found = estimate(_spec(spec_path), micro_batch=micro_batch)
    click.echo("\n".join(found.lines(runs_on_a_gpu)))


main.add_command(lora)


def open_probed(store_url: str) -> ObjectStore:
    """Open a store, whose create-only is used if it holds: somebody may have started the same run twice."""
    store, probed = open_and_probe(store_url)
    if not probed.atomic:
        why = f"{probed.reason}{probed.when}"
        click.echo(f"{store_url}: never start the same run twice at once here: {why}", err=True)
    return store


def _run(store: ObjectStore, run_id: str, spec: RunSpec, options: Options, grace_s: float) -> int:
    if not store.create(layout.run_spec(run_id), spec.model_dump_json().encode()):
        known = RunSpec.model_validate_json(store.get(layout.run_spec(run_id)))
        if known != spec:
            raise click.ClickException(
                f"run {run_id} is in the store with another spec: give another --run-id"
            )
    log = hinted_log(store, run_id)
    state = log.refresh()
    if state.finished:
        click.echo(f"{run_id} is over: {state.finished.outcome}", err=True)
        return EXIT_COMPLETE if state.outcome is Outcome.SUCCEEDED else 1
    if state.running:  # whoever held it is not us, and a person started us in its place
        detail = "replaced by hand"
        log.append(
            Ended(attempt=state.attempt, reason=EndReason.SUPERSEDED, detail=detail, step=0, at=time.time())
        )
    if state.result:  # whoever committed it died before saying so
        log.append(Finished(outcome=Outcome.SUCCEEDED, step=state.result.step, at=time.time()))
        click.echo(f"{run_id} is over: {Outcome.SUCCEEDED}", err=True)
        return EXIT_COMPLETE
    claimed = Claimed(
        attempt=state.attempt + 1,
        incarnation=secrets.token_hex(4),
        node="local",
        slot=f"pid-{secrets.token_hex(3)}",
        at=time.time(),
    )
    log.append(claimed)
    with tempfile.TemporaryDirectory() as scratch:
        supervisor = Supervisor(
            store,
            Assignment(run_id=run_id, attempt=claimed.attempt, incarnation=claimed.incarnation),
            spec,
            options,
            scratch=Path(scratch),
            ledger=log,
        )
        signal.signal(signal.SIGTERM, lambda number, frame: supervisor.stop(grace_s))
        signal.signal(signal.SIGINT, lambda number, frame: supervisor.stop(grace_s))
        progress = supervisor.run()
    if progress.error:
        click.echo(progress.error, err=True)
    with contextlib.suppress(Fenced):
        for _ in append_until_said(log, lambda state: _end(state, claimed.attempt, progress)):
            pass
    complete = log.state.outcome is Outcome.SUCCEEDED
    code = progress.exit_code or EXIT_COMPLETE
    return EXIT_COMPLETE if complete else code if code > 0 else 1


def _end(state: RunState, attempt: int, progress: Progress) -> tuple[Record, ...]:
    """Return the records with which a run, or only this attempt of it, is over."""
    now, code = time.time(), progress.exit_code or EXIT_COMPLETE
    if state.running is None or state.attempt != attempt:
        return ()  # somebody else goes on with it
    if code == EXIT_COMPLETE and state.result:
        return (Finished(outcome=Outcome.SUCCEEDED, step=state.result.step, at=now),)
    if code == EXIT_BAD_CONFIG:
        return (Finished(outcome=Outcome.FAILED, detail=progress.error, step=progress.step, at=now),)
    ended = Ended(
        attempt=attempt,
        reason=attributed(code, progress.evidence, progress.error),
        detail=progress.error,
        step=progress.step,
        exit_code=code,
        step_s=progress.step_s,
        memory_bytes=progress.evidence.memory_bytes,
        at=now,
    )
    has_spoken = state.running.committed_step is not None or state.running.refused
    if code == EXIT_BAD_CHECKPOINT and state.newest and not has_spoken:
        ref, why = state.newest.ref, progress.error
        return (Quarantined(checkpoint=ref, attempt=attempt, reason=why, at=now), ended)
    return (ended,)


def _spec(path: Path) -> RunSpec:
    try:
        return RunSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        click.echo(f"{path}: {problems}", err=True)
        sys.exit(EXIT_BAD_CONFIG)


if __name__ == "__main__":
    main()
