"""Whatever a file holds, it is a sweep or a list of problems; and what the reference says of it is true."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sweep_file import Write

from orchestrator.errors import InvalidFile
from orchestrator.grid.schema import BLOCKS, Checkpoint, Grid, Metric, Notices, Recovery, Resources, Storage
from orchestrator.grid.sweep import validate

FULL = {
    "name": "x",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "learning_rate": {"values": [1e-4, 1e-3]},
        "rank": {"value": "${parameters.seed}"},
        "seed": {"values": [1, 2]},
    },
    "include": [{"learning_rate": 3e-4, "seed": 5}],
    "exclude": [{"seed": 1, "learning_rate": 1e-4}],
    "base": {"model": "a/b", "max_train_steps": 10},
    "dataset": {"path": "data"},
    "samples": {"prompts": ["a ${parameters.rank}"]},
    "evaluate": {"command": ["python", "x.py"]},
    "storage": {"url": "./s"},
    "checkpoint": {"every": "5m"},
}
SCALARS = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, "x", "${parameters.seed}", "~nobody/x", "a\0b", "1m", "é"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["value", "values", "seed", "path", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)


def replaced(value: Any, draw: st.DrawFn) -> Any:
    """One value, somewhere inside, replaced by anything."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = replaced(value[key], draw)
        return copy
    return draw(VALUES)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.composite(
        lambda draw: {**FULL, (key := draw(st.sampled_from(sorted(FULL)))): replaced(FULL[key], draw)}
    )()
)
def test_whatever_a_file_holds_is_a_sweep_or_a_list_of_problems(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(data))
    try:
        count = len(validate(file).cells)
    except InvalidFile as error:
        count = len(error.problems)
    assert count > 0


ROOT = Path(__file__).parents[3]
REFERENCE = (ROOT / "docs" / "grid.md").read_text()

WHOLE_FILES = [
    text for text in re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL) if "parameters:" in text
]


@pytest.mark.parametrize("text", WHOLE_FILES, ids=["least", "whole"])
def test_the_files_in_the_reference_are_right(text: str, write: Write) -> None:
    path = write(text)
    (path.parent / "score.py").write_text("")
    assert len(validate(path).cells) in (2, 9)


def test_the_reference_names_every_key() -> None:
    named = {
        word for words in re.findall(r"`([^`\n]+)`", REFERENCE) for word in re.findall(r"[a-z0-9_]+", words)
    }
    models = [Grid, Metric, Resources, Notices, Storage, Checkpoint, Recovery, *BLOCKS.values()]
    assert {key for model in models for key in model.model_fields} - named == set()


def test_the_reference_explains_every_code() -> None:
    sources = (ROOT / "orchestrator").rglob("*.py")
    used = {code for path in sources for code in re.findall(r'"([EW]2\d{3})"', path.read_text())}
    assert used == set(re.findall(r"^\| ([EW]2\d{3}) \|", REFERENCE, re.MULTILINE))
