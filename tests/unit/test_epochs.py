"""Which image, caption and crop the n-th sample of a run is, with buckets and repeats."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.captions import caption_of
from trainer.config import Base, Dataset
from trainer.config.buckets import bucket_sizes, nearest
from trainer.data import EncodedImage, TrainingSet, View, sizes
from trainer.epochs import Epochs, order
from trainer.families import Posterior
from trainer.objective.process import Diffusion


@example(list("aaaabbbbc"), 4, 1)  # the parts of a step at both ends take one to pieces
@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 30))
def test_an_epoch_visits_each_slot_once(shapes: list[str], together: int, epoch: int) -> None:
    seen = order(shapes, 3, epoch, together)

    assert sorted(seen) == list(range(len(shapes)))
    assert order(shapes, 3, epoch, together) == seen


def test_samples_of_a_step_share_a_shape_as_far_as_that_goes() -> None:
    shapes = ["a"] * 13 + ["b"] * 9 + ["c"] * 3
    epochs = Epochs(shapes, seed=1, together=4)
    steps = [[shapes[epochs.slot(n)] for n in range(first, first + 4)] for first in range(0, 25 * 8, 4)]

    mixed = sum(len(set(step)) > 1 for step in steps)
    assert mixed <= 2 * 8 + 8, "at both ends of an epoch, and once for what is left over"
    assert mixed < len(steps) / 2
    shuffled = Epochs([(shape, n) for n, shape in enumerate(shapes)], seed=1, together=4)
    plain = [[shapes[shuffled.slot(n)] for n in range(first, first + 4)] for first in range(0, 25 * 8, 4)]
    assert sum(len(set(step)) > 1 for step in plain) > mixed


def test_epochs_differ_and_one_shape_is_shuffled_freely() -> None:
    epochs = [tuple(order(["a"] * 9, 0, epoch, 4)) for epoch in range(10)]

    assert len(set(epochs)) == 10
    assert {epoch[0] for epoch in epochs} > {epochs[0][0]}


def encoded(name: str, shape: tuple[int, int], repeats: int = 1) -> EncodedImage:
    posterior = Posterior(torch.zeros(4, *shape), torch.ones(4, *shape))
    return EncodedImage(name, name, (View(posterior),), (8 * shape[0], 8 * shape[1]), shape, repeats)


def test_passes_hold_one_shape_and_every_sample_comes_once() -> None:
    images = [encoded("a", (4, 4), 3), encoded("b", (4, 4)), encoded("c", (2, 6), 2), encoded("d", (6, 2))]
    base = Base(model="m", resolution=32, train_batch_size=2, gradient_accumulation_steps=2, seed=5)
    training = TrainingSet(
        images,
        base,
        Dataset(path="x"),
        Diffusion(torch.linspace(0.99, 0.01, 10), "epsilon"),
        latent_pixels=8,
    )

    batches = [batch for step in range(7) for batch in training.batches(step, 2)]
    assert all(len(batch.samples) <= 2 for batch in batches)
    seen = sorted(
        (n, caption) for batch in batches for n, caption in zip(batch.samples, batch.captions, strict=True)
    )
    assert [n for n, _ in seen] == list(range(28))
    for epoch in range(4):
        names = Counter(caption for n, caption in seen if n // 7 == epoch)
        assert names == {"a": 3, "b": 1, "c": 2, "d": 1}


def test_an_image_gets_the_bucket_nearest_to_its_aspect_ratio() -> None:
    dataset = Dataset(path="x", buckets=True)
    found = bucket_sizes(dataset, 512)

    assert all(256 <= side <= 2048 and side % 64 == 0 for size in found for side in size)
    assert all(height * width <= 512**2 for height, width in found)
    assert set(found) == {(width, height) for height, width in found}
    assert nearest((1000, 1000), found) == (512, 512)
    assert nearest((3000, 2000), found) == (640, 384)
    assert nearest((2000, 3000), found) == (384, 640)
    assert nearest((100, 5000), found) == (256, 1024), "the longest"
    assert bucket_sizes(Dataset(path="x"), 512) == ((512, 512),)


def test_sizes_are_true_under_buckets_and_crops() -> None:
    image = EncodedImage("a", "a", (), (600, 900), (4, 6))
    view = View(Posterior(torch.zeros(4, 5, 6), torch.zeros(4, 5, 6)), (3, 8))

    assert sizes(image, view, (1, 0), image.shape, 8).tolist() == [600, 900, 11, 8, 32, 48]


TAGS = "sks dog, red, big, happy, on grass"


def test_tags_are_shuffled_and_dropped_but_for_those_that_are_kept() -> None:
    dataset = Dataset(path="x", shuffle_caption=True, keep_tokens=1, tag_dropout=0.4)
    captions = [caption_of(dataset, TAGS, 0, n) for n in range(200)]

    tags = [caption.split(", ") for caption in captions]
    assert all(one[0] == "sks dog" for one in tags)
    assert all(len(set(one)) == len(one) and set(one) <= set(TAGS.split(", ")) for one in tags)
    share = sum(len(one) - 1 for one in tags) / (4 * 200)
    assert 0.53 < share < 0.67
    assert len({tuple(one) for one in tags if len(one) == 5}) > 5, "other orders"
    assert captions[17] == caption_of(dataset, TAGS, 0, 17)
    assert captions != [caption_of(dataset, TAGS, 1, n) for n in range(200)]


@pytest.mark.parametrize(
    ("separator", "caption", "tags"),
    [(",", "a,b , c", {"a", "b", "c"}), ("\n", "a\nb", {"a", "b"}), ("|", "a | b, c", {"a", "b, c"})],
)
def test_tags_are_what_lies_between_separators(separator: str, caption: str, tags: set[str]) -> None:
    dataset = Dataset(path="x", shuffle_caption=True, caption_separator=separator)

    assert {tag.strip() for tag in caption_of(dataset, caption, 0, 1).split(separator)} == tags


def test_a_caption_that_nothing_changes_stays_as_it_is() -> None:
    assert caption_of(Dataset(path="x", keep_tokens=2), " a ,b", 0, 1) == " a ,b"
