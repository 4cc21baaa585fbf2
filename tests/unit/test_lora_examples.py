"""The examples of ``orchestrate lora`` work, one after the other, on what ``make demo`` leaves."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.commands.demo import ADAPTER, DIGITS
from trainer.__main__ import main as trainer
from trainer.config import Base
from trainer.families import load_family
from trainer.methods import attach
from trainer.tensor_file import write
from trainer.weights.lora_file import read_lora
from trainer.weights.tools import TOOLS
from trainer.weights.writing import convert

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def after_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one where ``make demo`` was called."""
    shutil.copytree(DIGITS / "base", tmp_path / "examples" / "digits" / "base")
    base = Base(model=str(DIGITS / "base"), rank=2)
    methods = attach(base, load_family(base))
    numbers = torch.Generator().manual_seed(1)
    tensors = {
        name: (p + 0.05 * torch.randn(p.shape, generator=numbers)).detach()
        for name, p in methods.parameters.items()
    }
    checkpoint, out = tmp_path / "checkpoint.safetensors", demo_folder(tmp_path)
    write(checkpoint, tensors, methods.metadata())
    out.mkdir()
    convert(checkpoint, out / ADAPTER, "diffusers")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def demo_folder(root: Path) -> Path:
    (out,) = (option.default for option in main.commands["demo"].params if option.name == "out")
    return root / str(out)


def shown(text: str) -> list[str]:
    """The commands in a text, without what is remarked beside them."""
    return [line.partition("  #")[0].strip() for line in re.findall(r"orchestrate lora [a-z]+ .+", text)]


def test_each_example_of_the_help_works_after_the_one_before(after_the_demo: Path) -> None:
    helped = CliRunner().invoke(main, ["lora", "--help"]).output
    examples = [line.split() for line in shown(helped)]
    assert [words[2] for words in examples] == list(TOOLS)

    for words in examples:
        ran = CliRunner().invoke(trainer, words[1:])
        assert ran.exit_code == 0, f"{' '.join(words)}: {ran.output}"
    before, after = (
        read_lora(demo_folder(after_the_demo) / name) for name in (ADAPTER, "extracted.safetensors")
    )
    assert {m.name for m in after.modules} == {m.name for m in before.modules}
    for found, planted in zip(after.modules, before.modules, strict=True):
        torch.testing.assert_close(found.change_OI(), 0.8 * planted.change_OI(), rtol=1e-3, atol=1e-4)


def test_the_help_of_a_tool_and_the_page_show_the_same() -> None:
    helped = shown(CliRunner().invoke(main, ["lora", "--help"]).output)
    assert [shown(CliRunner().invoke(main, ["lora", tool, "--help"]).output) for tool in TOOLS] == [
        [example] for example in helped
    ]
    assert shown((DIGITS.parents[1] / "docs" / "lora.md").read_text()) == helped
