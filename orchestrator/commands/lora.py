"""``orchestrate lora``: the tools for adapter files. They need torch, so the trainer's process runs them."""

from collections.abc import Callable
from pathlib import Path

import click

from trainer.weights.tools import group

_GIVEN = "orchestrate.lora.given"


class _Forwarded(click.Command):
    """A command whose words, once they are understood, go to another process as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_GIVEN] = list(args)
        return super().parse_args(ctx, args)


def _forward(name: str) -> Callable[..., None]:
    def run(out: Path | None = None, force: bool = False, **others: object) -> None:
        from ..errors import InvalidFile, Problem
        from .exporting import trainer_lines

        if out is not None and out.exists() and not force:
            hint = "give --force to write over it, or another --out"
            raise InvalidFile([Problem("E2701", f"{out} is there already", hint=hint)])
        for line in trainer_lines("lora", name, *click.get_current_context().meta[_GIVEN]):
            click.echo(line)

    return run


lora = group("orchestrate", _forward, _Forwarded)
