"""``orchestrate generate``: images from an exported file, or straight from a run of a sweep."""

import tempfile
from pathlib import Path

import click

from .options import store_option


@click.command()
@click.argument("adapter", metavar="FILE_OR_RUN")
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be given several times.")
@click.option("--negative", default="", help="What the images must not show.")
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(1,), show_default=True, help="One image for each."
)
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Of DPM-Solver.")
@click.option("--cfg", type=click.FloatRange(min=0), default=7.0, show_default=True, help="Guidance.")
@click.option("--scale", type=float, default=0.8, show_default=True, help="As the number in <lora:name:0.8>.")
@click.option(
    "--base", "model", help="A hub id or a local model; by default what the file, or its card, says."
)
@click.option("--resolution", type=click.IntRange(min=8), help="Side of the image; by default as trained.")
@click.option("--step", type=click.IntRange(min=0), help="A run's checkpoint instead of its newest.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; by default under generated/.")
@store_option
def generate(
    adapter: str,
    prompts: tuple[str, ...],
    negative: str,
    seeds: tuple[int, ...],
    steps: int,
    cfg: float,
    scale: float,
    model: str | None,
    resolution: int | None,
    step: int | None,
    out: Path | None,
    store_url: str,
) -> None:
    """Draw images with an adapter: a .safetensors file, a folder of an export, or a run."""
    from .exporting import fetched_run, trainer_lines

    options = ["--negative", negative, "--steps", str(steps), "--cfg", str(cfg), "--scale", str(scale)]
    options += [word for prompt in prompts for word in ("--prompt", prompt)]
    options += [word for seed in seeds for word in ("--seed", str(seed))]
    options += ["--base", model] if model else []
    options += ["--resolution", str(resolution)] if resolution else []
    options += ["--out", str(out or _next_folder(Path("generated")))]
    with tempfile.TemporaryDirectory() as scratch:
        if Path(adapter).exists():
            options += ["--adapter", adapter]
        else:
            checkpoint, spec = fetched_run(store_url, adapter, step, Path(scratch))
            options += ["--adapter", str(checkpoint), "--spec", str(spec)]
        for image in trainer_lines("generate", *options):
            click.echo(image)


def _next_folder(root: Path) -> Path:
    """Return the first folder below ``root`` that is not there yet."""
    number = 1
    while (root / f"{number:03d}").exists():
        number += 1
    return root / f"{number:03d}"
