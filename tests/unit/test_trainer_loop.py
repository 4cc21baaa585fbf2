"""Steps in passes of any size, averages of the weights, optimizers' state, and runs that share a base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.tiny_world import tiny_spec
from support.training import Lay, StopAtStep, contents, newest

import trainer.attempt
from trainer.attempt import prepare, run_attempt
from trainer.config import Base, RunSpec
from trainer.loop import Loop
from trainer.methods import attach
from trainer.optim import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED
from trainer.snapshot import Progress
from trainer.step import Stepper
from trainer.stop import Stop
from trainer.tensor_file import read, write

DECAY = 0.9
SLOW_TEXTS = {"train_text_encoder": True, "text_encoder_learning_rate": 0.5}


def spec_of(world: Path, **base: Any) -> RunSpec:
    return tiny_spec(world / "base", world / "images", base=base)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("adamw", (1.0, 0.5)),
        ("adamw8bit", (1.0, 0.5)),
        ("adafactor", (1.0, 0.5)),
        ("lion", (1.0, 0.5)),
        ("prodigy", (1.0, 1.0)),
    ],
)
def test_an_optimizer_of_two_groups_goes_on_as_if_nothing_had_been(
    name: str, rates: tuple[float, float], tmp_path: Path
) -> None:
    base = Base.model_validate(
        {"model": "m", "optimizer": name, "learning_rate": 0.1, "adam8bit_min_size": 8}
    )

    def fresh() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        # As in an adapter, one starts at 0. Its first gradient is 0 as well, so it does not move at once.
        values = {"a": torch.linspace(-1, 1, 32).view(4, 8), "b": torch.zeros(8, 4)}
        parameters = {key: torch.nn.Parameter(value.clone()) for key, value in values.items()}
        groups = [([p], rate) for p, rate in zip(parameters.values(), rates, strict=True)]
        return parameters, build_optimizer(base, groups)

    def steps(
        parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range
    ) -> None:
        for n in numbers:
            set_learning_rate(optimizer, 0.1 / (1 + n))
            for parameter in parameters.values():
                parameter.grad = torch.sin(torch.arange(32.0) * n).view_as(parameter) + parameter.detach()
            optimizer.step()

    straight, optimizer = fresh()
    steps(straight, optimizer, range(6))

    first, optimizer = fresh()
    steps(first, optimizer, range(3))
    write(tmp_path / "optimizer.safetensors", optimizer_state(optimizer, first), {})
    second, optimizer = fresh()
    for key, parameter in second.items():
        parameter.data.copy_(first[key].data)
    assert load_optimizer_state(optimizer, second, read(tmp_path / "optimizer.safetensors")[0]) is None
    steps(second, optimizer, range(3, 6))

    assert not torch.equal(straight["b"], torch.zeros(8, 4)), "it did not move"
    for key, parameter in second.items():
        assert torch.equal(parameter, straight[key])


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({}, "set learning_rate to 1, and change prodigy_d_coef"),
        (
            {"learning_rate": 1.0, "text_encoder_learning_rate": 0.5},
            "leave it out, or take another optimizer",
        ),
    ],
)
def test_prodigy_is_refused_what_it_cannot_do(world: Path, base: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec_of(world, optimizer="prodigy", **base)


def test_a_checkpoint_delivers_the_average_which_is_no_part_of_the_training(world: Path, lay: Lay) -> None:
    averaged, plain = lay("averaged", spec_of(world, ema_decay=DECAY)), lay("plain", spec_of(world))
    parts = prepare(plain, Stop())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parts.methods.parameters.items()}
    stepper = Stepper(parts, None)
    for step in range(4):
        stepper.take(step)
        decay = min(DECAY, (step + 1) / (10 + step)) if step else 0.0
        for name, parameter in parts.methods.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()

    assert run_attempt(averaged, StopAtStep(averaged, 4)) == EXIT_PREEMPTED

    delivered = read(newest(averaged) / "adapter.safetensors")[0]
    torch.testing.assert_close(delivered, expected, rtol=1e-5, atol=1e-8)
    beside = read(newest(averaged) / "optimizer.safetensors")[0]
    for name, parameter in parts.methods.parameters.items():
        assert torch.equal(beside[f"{name}#parameter"], parameter)
    assert not all(torch.equal(delivered[name], beside[f"{name}#parameter"]) for name in delivered)


def test_the_average_is_what_is_validated(world: Path, lay: Lay) -> None:
    ends = []
    for name, decay in (("averaged", DECAY), ("plain", None)):
        run_dir = lay(name, spec_of(world, max_train_steps=2, learning_rate=0.1, ema_decay=decay))
        assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
        ends.append(json.loads(contents(newest(run_dir))["manifest.json"])["metrics"])

    assert ends[0]["train/loss"] == ends[1]["train/loss"]
    assert ends[0]["val/loss"] != ends[1]["val/loss"]


def test_a_step_is_the_same_in_passes_of_any_size(world: Path, lay: Lay) -> None:
    spec = spec_of(world, lora_dropout=0.0)
    seen, gradients = [], []
    for name, micro_batch in (("1", 1), ("2", 2), ("4", 4), ("2 again", 2), ("as written", None)):
        parts = prepare(lay(name, spec, micro_batch=micro_batch), Stop())
        batches = parts.training.batches(1, micro_batch or spec.base.train_batch_size)
        assert max(len(batch.samples) for batch in batches) == (micro_batch or 2)
        seen.append([(batch.noise_BCHW[i], n) for batch in batches for i, n in enumerate(batch.samples)])
        for parameter in parts.methods.parameters.values():
            if not parameter.any():
                parameter.data.fill_(0.01)  # so that both matrices of each layer have a gradient
        Stepper(parts, None)._accumulate(1)
        gradients.append({name: p.grad for name, p in parts.methods.parameters.items()})

    for other in seen[1:]:
        assert [n for _, n in other] == [n for _, n in seen[0]] == [4, 5, 6, 7]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(other, seen[0], strict=True))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
    for other in gradients[3:]:
        assert all(torch.equal(other[name], gradients[1][name]) for name in other)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_runs_that_share_a_base_in_one_process_end_as_they_do_alone(
    world: Path, lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"validation": {"every": 2, "timesteps": 2}}
    specs = {
        "one": tiny_spec(world / "base", world / "images", base={"max_train_steps": 4}, **blocks),
        "two": tiny_spec(
            world / "base",
            world / "images",
            base={"max_train_steps": 4, "seed": 9, "rank": 2, "optimizer": "adamw8bit", "ema_decay": DECAY},
            **blocks,
        ),
    }
    alone = {}
    for name, spec in specs.items():
        run_dir = lay(f"{name} alone", spec)
        assert run_attempt(run_dir, Stop()) == EXIT_COMPLETE
        alone[name] = contents(newest(run_dir))

    loads, load = [], trainer.attempt.load_family

    def shared(*arguments: Any) -> Any:
        if not loads:
            loads.append(load(*arguments))
            monkeypatch.setattr(loads[0], "free_text_encoders", lambda: None)
        return loads[0]

    monkeypatch.setattr(trainer.attempt, "load_family", shared)
    run_dirs = {name: lay(f"{name} beside the other", spec) for name, spec in specs.items()}
    loops = []
    for name, run_dir in run_dirs.items():
        monkeypatch.setattr(
            trainer.attempt, "attach", lambda base, family, name=name: attach(base, family, name)
        )
        loops.append(Loop(prepare(run_dir, Stop()), Progress()))
    for loop in loops:
        loop.begin()
    for _ in range(3):
        for loop in loops:
            loop.advance()
    assert [loop.run() for loop in loops] == [EXIT_COMPLETE] * 2

    for name, run_dir in run_dirs.items():
        assert contents(newest(run_dir)) == alone[name]
