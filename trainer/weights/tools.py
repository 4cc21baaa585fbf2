"""The tools of ``orchestrate lora``: their names, arguments and examples. Imports no torch.

``python -m trainer lora`` runs them; ``orchestrate lora`` knows the same arguments and lets it run them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

FORMS = {
    "diffusers": "diffusers",
    "kohya": "kohya",
    "a1111": "kohya",
    "comfyui": "kohya",
    "lycoris": "kohya",
    "ours": "ours",
    "peft": "peft",
}
"""What ``--to`` takes, and the form that it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool, without what it does."""

    help: str
    example: str
    """Works where ``make demo`` was called, after those of the tools before it."""
    parameters: tuple[click.Parameter, ...]


_share = click.FloatRange(min=0, max=1, min_open=True)
_to = click.Option(
    ["--to", "to"], type=click.Choice(list(FORMS)), help="Form of the file; by default the input's."
)
_dtype = click.Option(
    ["--dtype"], type=click.Choice(["fp32", "fp16", "bf16"]), help="By default the input's."
)
_force = click.Option(["--force"], is_flag=True, help="Write over what is there.")
_out = click.Option(
    ["--out"],
    type=click.Path(path_type=Path),
    required=True,
    help="The file to write; --to peft: the folder.",
)
_one = click.Argument(["file"], type=click.Path(path_type=Path))
_several = click.Argument(["files"], nargs=-1, required=True, metavar="FILE[:WEIGHT]...")
_base = click.Option(["--base"], required=True, help="A diffusers folder, a .safetensors file or a hub id.")
_rank = click.Option(["--rank"], type=click.IntRange(min=1), help="At most this rank.")
_threshold = click.Option(
    ["--threshold"], type=click.FloatRange(min=0), help="Singular values larger than this."
)
_ratio = click.Option(["--ratio"], type=_share, help="Singular values of at least this share of the largest.")
_ranks = (
    _rank,
    _threshold,
    _ratio,
    click.Option(["--cumulative"], type=_share, help="This share of the sum of the singular values."),
    click.Option(["--frobenius"], type=_share, help="This share of the Frobenius norm of the change."),
)

TOOLS: Mapping[str, Tool] = {
    "inspect": Tool(
        help="Say what an adapter's file is: form, family, ranks, alphas, trained modules, header.",
        example="inspect demo/nine.safetensors",
        parameters=(
            _one,
            click.Option(["--keys"], is_flag=True, help="One line for each module too."),
            click.Option(["--json", "as_json"], is_flag=True, help="Everything, as JSON."),
        ),
    ),
    "convert": Tool(
        help="Write an adapter's file in another form: nothing but names and types changes.",
        example="convert demo/nine.safetensors --to kohya --out demo/nine-kohya.safetensors",
        parameters=(
            _one,
            _out,
            click.Option(
                ["--to", "to"], type=click.Choice(list(FORMS)), required=True, help="Form of the file."
            ),
            _dtype,
            click.Option(
                ["--fold"], is_flag=True, help="Multiply the scale into the numbers: alpha is the rank then."
            ),
            _force,
        ),
    ),
    "resize": Tool(
        help="Write the best LoRA of another rank, the same for all modules or as large as each one needs.",
        example="resize demo/nine.safetensors --rank 1 --out demo/small.safetensors",
        parameters=(_one, _out, *_ranks, _to, _dtype, _force),
    ),
    "mix": Tool(
        help="Write the weighted sum of what several LoRAs change: exact, or in a smaller rank.",
        example="mix demo/nine.safetensors:0.7 demo/small.safetensors:0.3 --out demo/both.safetensors",
        parameters=(_several, _out, *_ranks, _to, _dtype, _force),
    ),
    "merge": Tool(
        help="Write a base model with adapters added to its weights, as a diffusers folder.",
        example="merge demo/nine.safetensors:0.8 --base examples/digits/base --out demo/merged",
        parameters=(
            _several,
            _base,
            click.Option(
                ["--out"], type=click.Path(path_type=Path), required=True, help="The folder to write."
            ),
            click.Option(
                ["--dtype"], type=click.Choice(["fp32", "fp16", "bf16"]), help="By default the base's."
            ),
            _force,
        ),
    ),
    "extract": Tool(
        help="Write the LoRA that comes nearest to what a finetuned model changes of its base.",
        example="extract demo/merged --base examples/digits/base --rank 4 --out demo/extracted.safetensors",
        parameters=(
            click.Argument(["tuned"]),
            _base,
            _out,
            _rank,
            click.Option(["--conv-rank"], type=click.IntRange(min=1), help="Of kernels larger than 1."),
            _threshold,
            _ratio,
            click.Option(["--to", "to"], type=click.Choice(list(FORMS)), default="kohya", show_default=True),
            click.Option(
                ["--dtype"], type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True
            ),
            _force,
        ),
    ),
}


def group(
    program: str, callback_of: Callable[[str], Callable[..., None]], kind: type[click.Command]
) -> click.Group:
    """Return the command ``lora`` of a program, with an example of each tool in its help.

    Args:
        callback_of: What a tool, by its name, does with its arguments.
        kind: The class of each tool's command.
    """
    examples = "\n".join(f"  {program} lora {tool.example}" for tool in TOOLS.values())
    lora = click.Group(
        "lora",
        help="Tools for adapter files: .safetensors of diffusers, kohya, LyCORIS and our checkpoints.",
        epilog=f"\b\nExamples:\n{examples}",
    )
    for name, tool in TOOLS.items():
        shown = f"{tool.help}\n\n\b\nExample: {program} lora {tool.example}"
        lora.add_command(kind(name, params=list(tool.parameters), callback=callback_of(name), help=shown))
    return lora
