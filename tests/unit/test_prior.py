"""Prior preservation: class images, what they weigh, and the online form."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_world import build_images, tiny_spec
from support.training import Lay, contents, interrupted, newest
from torch import Tensor

from trainer.attempt import prepare
from trainer.batch import Batch
from trainer.config import Base, Dataset, Prior, RunSpec
from trainer.data import EncodedImage, TrainingSet, View
from trainer.errors import BadInput
from trainer.families import Family, Posterior, load_family
from trainer.objective.process import Diffusion
from trainer.parts import Parts
from trainer.prior import class_examples
from trainer.randomness import generator
from trainer.step import Stepper
from trainer.stop import Stop, Stopped
from trainer.texts import LiveTexts, Texts

# Of diffusers' sampler, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT = "a photo of a dog"
PRIOR = {"prompt": PROMPT, "images": 3, "steps": 2, "weight": 0.25}


def spec_of(world: Path, prior: dict[str, Any] | None = None, **base: Any) -> RunSpec:
    return tiny_spec(
        world / "base",
        world / "images",
        base={"max_train_steps": 3, **base},
        prior={**PRIOR, **(prior or {})},
    )


@dataclass
class StopOnceThere(Stop):
    """A stop that is requested once a folder holds so many images."""

    folder: Path
    count: int
    alive: Any = field(default=lambda: None)

    @property
    def requested(self) -> bool:
        return len(list(self.folder.glob("[!.]*.png"))) >= self.count


def bodies(paths: Iterator[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(paths)}


def test_class_images_are_drawn_once_and_an_interrupted_start_draws_the_rest(
    world: Path, tmp_path: Path
) -> None:
    spec = spec_of(world)
    family = load_family(spec.base)

    def drawn(folder: Path, stop: Stop) -> dict[str, bytes]:
        examples = class_examples(spec, family, LiveTexts(family), folder, stop)
        assert [example.caption for example in examples] == [PROMPT] * 3
        return bodies(example.path for example in examples)

    straight = drawn(tmp_path / "straight", Stop())
    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        drawn(cut, StopOnceThere(cut, 2))
    kept = {path: path.stat().st_mtime_ns for path in cut.iterdir()}
    assert len(kept) == 2
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:40])

    assert drawn(cut, Stop()) == straight
    assert len(set(straight.values())) == 3
    assert {path.stat().st_mtime_ns == kept[path] for path in kept if path != damaged} == {True}
    other = spec_of(world, {"cfg": 2.0})
    with pytest.raises(Stopped):  # it would have to draw
        class_examples(other, family, LiveTexts(family), cut, StopOnceThere(cut, 3))


def test_given_class_images_come_first(world: Path, tmp_path: Path) -> None:
    given = build_images(tmp_path / "given", count=2)
    spec = spec_of(world, {"path": str(given)})
    family = load_family(spec.base)

    examples = class_examples(spec, family, LiveTexts(family), tmp_path / "drawn", Stop())

    assert [example.path.parent.name for example in examples] == ["given", "given", "drawn"]
    assert {example.caption for example in examples} == {PROMPT}
    (tmp_path / "empty").mkdir()
    for path, said in (("empty", "holds no PNG"), ("nowhere", "is not a folder")):
        spec = spec_of(world, {"path": str(tmp_path / path)})
        with pytest.raises(BadInput, match=said):
            class_examples(spec, family, LiveTexts(family), tmp_path / "drawn", Stop())


def training_set(kind: str, count: int, **beside: Any) -> TrainingSet:
    zero = Posterior(torch.zeros(4, 5, 5), torch.ones(4, 5, 5))
    images = [
        EncodedImage(name=f"{n}", caption=f"{kind} {n}", views=(View(zero),), original=(40, 40), shape=(4, 4))
        for n in range(count)
    ]
    base = Base(model="m", train_batch_size=2, gradient_accumulation_steps=2, seed=5)
    process = Diffusion(torch.linspace(0.99, 0.01, 100), "epsilon")
    return TrainingSet(images, base, Dataset(path=""), process, latent_pixels=8, **beside)


def test_a_prior_changes_nothing_of_the_images_own_samples() -> None:
    """Class images have samples of their own, and come as evenly as images do."""
    prior = Prior(prompt=PROMPT, weight=0.5)
    alone = training_set("image", 5)
    beside = training_set("image", 5, prior=prior, class_images=training_set("class", 3))
    class_captions: list[str] = []
    for step in range(3):
        own, class_pass = beside.batches(step, 4)
        (expected,) = alone.batches(step, 4)
        for name in ("samples", "captions"):
            assert getattr(own, name) == getattr(expected, name)
        for name in ("x0_BCHW", "noise_BCHW", "timesteps_B", "weights_B"):
            assert torch.equal(getattr(own, name), getattr(expected, name))
        assert class_pass.samples == tuple(-1 - n for n in own.samples)
        assert class_pass.weights_B.tolist() == [0.5] * 4
        assert not torch.equal(class_pass.noise_BCHW, own.noise_BCHW)
        class_captions += class_pass.captions
    assert Counter(class_captions) == {"class 0": 4, "class 1": 4, "class 2": 4}


def test_several_classes_take_turns() -> None:
    prior = Prior(prompt=("a cat", "a dog", "a fox"), online=True)
    _, twins = training_set("image", 5, prior=prior).batches(1, 4)

    assert dict(zip(twins.samples, twins.captions, strict=True)) == {
        -5: "a dog",
        -6: "a fox",
        -7: "a cat",
        -8: "a dog",
    }


def one_by_one(parts: Parts, step: int) -> list[tuple[int, Batch]]:
    """Each sample of a step in a pass of its own, by index."""
    return [(batch.samples[0], batch) for batch in parts.training.batches(step, 1)]


def predicted(family: Family, texts: Texts, batch: Batch) -> Tensor:
    noisy = family.process.add_noise(batch.x0_BCHW, batch.noise_BCHW, batch.timesteps_B)
    with torch.no_grad():
        conditioning = texts.conditioning(batch.captions) | family.size_conditioning(batch.sizes_B6)
        return family.predict(noisy, batch.timesteps_B, conditioning)


def squared_error(parts: Parts, batch: Batch) -> Tensor:
    """Of the run's prediction of noise."""
    return (predicted(parts.family, parts.texts, batch) - batch.noise_BCHW).square().mean()


def test_images_and_class_images_each_weigh_by_their_own_timesteps(world: Path, lay: Lay) -> None:
    """L = mean of w(t_i) loss_i + weight * mean of w(t_j) loss_j, each by its own timestep."""
    spec = spec_of(world, lora_dropout=0.0, loss_weighting="min_snr")
    parts = prepare(lay("run", spec), Stop())
    process = parts.family.process
    assert isinstance(process, Diffusion)
    expected = 0.0
    samples = one_by_one(parts, 1)
    for n, batch in samples:
        t = int(torch.randint(0, 1000, (), generator=generator(3, "timestep", n)))
        assert batch.timesteps_B.tolist() == [t]
        snr = float(process.alpha_bar_T[t] / (1 - process.alpha_bar_T[t]))
        weight = min(snr, 5) / snr * (0.25 if n < 0 else 1)
        assert (batch.captions == (PROMPT,)) == (n < 0)
        expected += weight * float(squared_error(parts, batch)) / 4

    loss = Stepper(parts, None)._accumulate(1)

    assert [n for n, _ in samples] == [4, 5, 6, 7, -5, -6, -7, -8]
    assert len({float(batch.timesteps_B) for _, batch in samples}) == 8
    assert loss == pytest.approx(expected, rel=1e-4)


def test_online_the_base_is_asked_about_the_same_noisy_image(world: Path, lay: Lay) -> None:
    spec = spec_of(world, {"online": True}, lora_dropout=0.0, train_text_encoder=True)
    parts = prepare(lay("run", spec), Stop())
    stepper = Stepper(parts, None)
    samples = dict(one_by_one(parts, 0))

    for n in range(4):
        own, twin = samples[n], samples[-1 - n]
        assert (own.from_base, twin.from_base) == (False, True)
        assert torch.equal(own.x0_BCHW, twin.x0_BCHW)
        assert torch.equal(own.noise_BCHW, twin.noise_BCHW)
        assert torch.equal(own.timesteps_B, twin.timesteps_B)
        assert (twin.captions, twin.weights_B.tolist()) == ((PROMPT,), [0.25])
    alone = sum(float(squared_error(parts, samples[n])) for n in range(4)) / 4
    assert stepper._accumulate(0) == pytest.approx(alone, rel=1e-5), "what is not trained yet loses nothing"
    for parameter in parts.methods.parameters.values():
        parameter.data += 0.1
    base = load_family(spec.base)
    change = predicted(parts.family, parts.texts, samples[-1]) - predicted(base, LiveTexts(base), samples[-1])
    assert float(change.square().mean()) > 1e-6
    loss = float(stepper._loss(samples[-1]).detach())
    assert loss == pytest.approx(0.25 * float(change.square().mean()), rel=1e-4)


@pytest.mark.parametrize("prior", [{}, {"online": True}], ids=["class-images", "online"])
def test_a_step_beside_a_prior_is_the_same_in_passes_of_any_size(
    world: Path, lay: Lay, prior: dict[str, Any]
) -> None:
    spec = spec_of(world, prior, lora_dropout=0.0)
    gradients = []
    for micro_batch in (1, 2, 4):
        parts = prepare(lay(str(micro_batch), spec, micro_batch=micro_batch), Stop())
        for parameter in parts.methods.parameters.values():
            if not parameter.any():
                parameter.data.fill_(0.01)  # both matrices of each layer have a gradient, the prior a loss
        Stepper(parts, None)._accumulate(1)
        own = (parameter.grad for parameter in parts.methods.parameters.values())
        gradients.append(torch.cat([grad.flatten() for grad in own if grad is not None]))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.parametrize(
    ("prior", "base"),
    [
        ({}, {"loss_weighting": "p2", "noise_offset": 0.1, "adaptive_noise_scale": 0.1}),
        ({"online": True}, {"loss": "huber", "multires_noise_iterations": 4, "input_perturbation": 0.1}),
    ],
    ids=["class-images", "online"],
)
def test_stopped_equals_never_stopped(
    world: Path, lay: Lay, prior: dict[str, Any], base: dict[str, Any]
) -> None:
    spec = spec_of(world, prior, **base)
    straight, _, second = interrupted(lay, spec, 2)

    assert contents(newest(second)) == contents(newest(straight))
