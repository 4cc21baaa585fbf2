"""What an adapter's file is, in a few lines or as JSON."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .lora_file import LoraFile, read_lora

_LONG = 160
"""Characters of a header's value that are shown."""


def inspect(path: Path) -> dict[str, Any]:
    """Return what a file says: form, family, kind, type, size, networks with ranks and alphas, header.

    ``modules`` has one entry for each, with rank and alpha.

    Raises:
        BadInput: See ``read_lora``.
    """
    lora = read_lora(path)
    return {
        "file": str(path),
        "size_bytes": sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()),
        "form": lora.form,
        "family": lora.family,
        "kind": "dora" if lora.has_magnitudes else lora.kind,
        "dtype": str(lora.dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for m in lora.modules for tensor in m.tensors.values()),
        "networks": {
            network: _network(lora, network) for network in sorted({m.network for m in lora.modules})
        },
        "modules": {
            f"{m.network}.{m.name}": {"rank": m.rank, "alpha": _plain(m.scale * m.rank)} for m in lora.modules
        },
        "metadata": dict(lora.metadata),
    }


def in_lines(found: dict[str, Any], *, keys: bool = False) -> list[str]:
    """Return what ``inspect`` found for a person to read.

    Args:
        keys: One line for each module too.
    """
    lines = [
        f"{found['file']}: {found['kind']} of {found['family'] or 'a family that it does not tell'}, "
        f"in the form {found['form']}, {found['dtype']}",
        f"{found['parameters']:,} numbers, {found['size_bytes']:,} bytes",
    ]
    for network, said in found["networks"].items():
        lines.append(
            f"{network}: {said['modules']} modules, rank {_counted(said['ranks'])}, alpha "
            f"{_counted(said['alphas'])}; {', '.join(said['trained'])}"
        )
    if keys:
        lines += [f"{name}  rank {m['rank']} alpha {m['alpha']}" for name, m in found["modules"].items()]
    lines += [f"{key} = {_short(value)}" for key, value in sorted(found["metadata"].items())]
    return lines if found["metadata"] else [*lines, "the header says nothing more"]


def _network(lora: LoraFile, network: str) -> dict[str, Any]:
    own = [module for module in lora.modules if module.network == network]
    return {
        "modules": len(own),
        "ranks": _counts(module.rank for module in own),
        "alphas": _counts(_plain(module.scale * module.rank) for module in own),
        "trained": sorted({_ending(module.name) for module in own}),
    }


def _ending(name: str) -> str:
    """Return the last words of a module's name that are no bare number: ``to_q``, ``to_out.0``."""
    words = name.split(".")
    first = next((n for n in range(len(words) - 1, -1, -1) if not words[n].isdecimal()), 0)
    return ".".join(words[first:])


def _counts(values: Iterable[float]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in Counter(values).most_common()}


def _counted(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} (×{count})" for value, count in counts.items())


def _plain(alpha: float) -> float:
    """Alpha without what a quotient and a product of it added."""
    return float(f"{alpha:.7g}")


def _short(value: str) -> str:
    text = json.dumps(value, ensure_ascii=False)[1:-1]
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
