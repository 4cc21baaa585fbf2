"""What the README and docs/ show is true: `validate` takes each sweep file, each file named is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.grid.file import parse
from orchestrator.grid.sweep import validate

ROOT = Path(__file__).resolve().parents[2]
USUAL: dict[str, dict[str, Any]] = {
    "base": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "dataset": {"path": "photos"},
    "parameters": {"base.seed": {"values": [1, 2]}},
}
"""What a fragment leaves out."""


def shown() -> Iterator[Any]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for block in re.finditer(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start()) + 1
            yield pytest.param(block[1], id=f"{page.name}:{line}")


@pytest.mark.parametrize("block", list(shown()))
def test_what_is_shown_is_accepted(block: str, tmp_path: Path) -> None:
    told = parse(block, "grid.yaml").data
    if "command" not in told:
        told = USUAL | told | {key: USUAL[key] | told.get(key, {}) for key in ("base", "dataset")}
    (tmp_path / "grid.yaml").write_text(json.dumps(told))
    assert validate(tmp_path / "grid.yaml").cells


def test_the_readme_and_docs_show_some() -> None:
    assert len(list(shown())) > 20


@pytest.mark.parametrize("train", ["adapter", ["adapter"], ["adapter", "hypernetwork"]])
def test_what_is_trained_is_a_word_or_a_list(train: Any, tmp_path: Path) -> None:
    base = USUAL["base"] | {"train": train}
    (tmp_path / "grid.yaml").write_text(json.dumps(USUAL | {"base": base}))
    for _, spec in validate(tmp_path / "grid.yaml").cells:
        assert spec.base.train == ((train,) if isinstance(train, str) else tuple(train))


def test_files_that_are_named_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    folders = [ROOT, ROOT / "tests" / "unit", ROOT / "tests" / "conformance"]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(
            r"`((?:tests|benchmarks|infra|examples)/[\w/]+(?:\.\w+|/)|test_\w+\.py)`", page.read_text()
        )
    }
    assert len(named) > 20
    assert not [each for each in named if not any((folder / each[1]).exists() for folder in folders)]
