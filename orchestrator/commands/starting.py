"""``orchestrate init``: a commented sweep file to begin with, from a preset that ships with the program."""

import shutil
from pathlib import Path

import click

from ..errors import InvalidFile, OrchestrateError, Problem

PRESETS = Path(__file__).resolve().parents[1] / "presets"
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
TINY = "tiny"
"""The preset with a model and images of its own: ``examples/digits`` of a checkout, for any CPU."""


def presets() -> list[str]:
    """Return the presets' names."""
    return [TINY, *sorted(path.stem for path in PRESETS.glob("*.yaml"))]


@click.command()
@click.option("--preset", type=click.Choice(presets()), default="sd15", show_default=True)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def init(preset: str, folder: Path) -> None:
    """Write a commented grid.yaml into FOLDER, to change and to sweep. Nothing is written over."""
    target = folder / "grid.yaml"
    if target.exists():
        raise InvalidFile([Problem("E2704", f"{target} is there already", hint="name another folder")])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if preset == TINY:
            if not DIGITS.is_dir():
                hint = "clone the repository, or take another --preset"
                raise InvalidFile([Problem("E2703", f"{DIGITS} does not ship with a package", hint=hint)])
            # The sweep file last: without it, init begins anew.
            for name in ("base", "nines"):
                shutil.copytree(DIGITS / name, folder / name, dirs_exist_ok=True)
            for name in ("world.py", "score.py", "grid.yaml"):
                shutil.copyfile(DIGITS / name, folder / name)
        else:
            shutil.copyfile(PRESETS / f"{preset}.yaml", target)
    except OSError as error:
        raise OrchestrateError(f"{folder} cannot be written: {error.strerror}") from error
    click.echo(target)
    click.echo(f"Change it, then: orchestrate validate {target}", err=True)
