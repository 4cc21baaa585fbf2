"""Prior preservation: while a model learns its images, the class that they are of stays what it was.

Ruiz et al. 2023 (DreamBooth, section 3.2): beside each image one of the class is trained on, with the class's
name as its caption: ``loss = mean_i w_i loss_i + weight * mean_j loss_j``, in which each loss has its own
noise and timestep, and the weight of its own noise level. Class images come from a folder, and are then
drawn from the base as it is before training. Each drawn one is a file in this node's cache, named by all that
decides it: an interrupted start draws what is missing, and another run of the same base draws none.

Online, nothing is drawn: the base's own prediction at the image's noisy latents, for the class's name, is
what the adapted model must keep predicting for it.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
from PIL import Image

from .cache import Cache, cache_key, tensors_digest
from .config import Dataset, Prior, RunSpec, Samples
from .data import TrainingSet
from .dataset.folder import Example, files_in, fill_trigger
from .dataset.images import is_image, read_image
from .encode import encode_images
from .errors import BadInput
from .families import Family
from .narration import say
from .randomness import key, platform_fingerprint
from .rundir import Options, cache_folder
from .sample import draw_images
from .stop import Stop
from .texts import Texts

PRIOR_SEED = 0
"""Class images do not depend on the run's seed: all runs of a sweep have the same ones."""


def prior_of(spec: RunSpec) -> Prior | None:
    """Return the run's prior with ``[trigger]`` replaced in its prompts."""
    prior = spec.prior
    if prior is None:
        return None
    prompts = tuple(fill_trigger(prompt, spec.dataset.trigger) for prompt in prior.prompts)
    return prior.model_copy(update={"prompt": prompts})


def prior_texts(spec: RunSpec) -> list[str]:
    """Every text that must be encoded to draw class images and to train on them."""
    prior = prior_of(spec)
    return ["", *prior.prompts] if prior else []


def class_spec(spec: RunSpec) -> RunSpec:
    """Return the run with class images for its dataset: trained on as images are, whole, by one caption."""
    dataset = spec.dataset
    plain = Dataset(path="", random_flip=dataset.random_flip, center_crop=dataset.center_crop)
    if dataset.buckets:
        sizes = {name: getattr(dataset, name) for name in ("bucket_min", "bucket_max", "bucket_step")}
        plain = plain.model_copy(update={"buckets": True, **sizes})
    return spec.model_copy(update={"dataset": plain})


def class_set(
    spec: RunSpec, options: Options, family: Family, cache: Cache, texts: Texts, stop: Stop
) -> TrainingSet | None:
    """Return the class images of a run, encoded, to be trained on; None without any.

    Args:
        spec: With paths as they are on this node.
        family: The bare base, which can still encode images; nothing is attached to it yet.

    Raises:
        As ``class_examples`` and ``encode_images``.
    """
    examples = class_examples(spec, family, texts, cache_folder(options) / "class-images", stop)
    if not examples:
        return None
    of_class = class_spec(spec)
    images = encode_images(family, cache, examples, of_class, stop.alive)
    return TrainingSet(
        images, spec.base, of_class.dataset, family.process, latent_pixels=family.latent_pixels
    )


def class_examples(spec: RunSpec, family: Family, texts: Texts, folder: Path, stop: Stop) -> list[Example]:
    """Return the class images of a run, drawing those that are nowhere yet. None for an online prior.

    Args:
        family: The bare base: nothing is attached to it yet.
        folder: Where drawn images are kept.

    Raises:
        BadInput: The given folder is none, or holds no image.
        Stopped: A stop was requested meanwhile; what was drawn so far is kept.
    """
    prior = prior_of(spec)
    if prior is None or prior.online:
        return []
    examples = list(_given(prior, Path(prior.path).expanduser())) if prior.path else []
    if len(examples) >= prior.images:
        return examples
    wanted = _drawn(spec, prior, family, prior.images - len(examples), folder)
    missing = [n for n, path in enumerate(wanted) if not _is_whole(path)]
    if missing:
        say(f"drawing {len(missing)} class images of {' and '.join(map(repr, prior.prompts))} from the base")
    folder.mkdir(parents=True, exist_ok=True)
    for n in missing:
        stop.check()
        _write(wanted[n], _draw(spec, prior, family, texts, n, stop))
    return examples + [Example(path.name, path, _prompt(prior, n)) for n, path in enumerate(wanted)]


def _given(prior: Prior, folder: Path) -> Iterator[Example]:
    if not folder.is_dir():
        raise BadInput(
            f"prior.path {folder} is not a folder",
            "leave it out: class images are then drawn from the base",
        )
    images = [(name, path) for name, path in files_in(folder) if is_image(name)]
    if not images:
        raise BadInput(
            f"prior.path {folder} holds no PNG, JPEG or WebP image",
            "leave it out: class images are then drawn from the base",
        )
    for n, (name, path) in enumerate(images):
        yield Example(name, path, _prompt(prior, n))


def _prompt(prior: Prior, n: int) -> str:
    return prior.prompts[n % len(prior.prompts)]


def _drawn(spec: RunSpec, prior: Prior, family: Family, count: int, folder: Path) -> list[Path]:
    """The paths of drawn class images: each named by all that decides its pixels."""
    base = [
        tensors_digest(family.denoiser.state_dict()),
        family.text_identity(),
        family.image_identity(),
        json.dumps(dict(family.sampling_schedule().config), sort_keys=True, default=str),
    ]
    return [
        folder
        / (
            cache_key(
                kind="class image",
                base=" ".join(base),
                prompt=_prompt(prior, n),
                n=n,
                steps=prior.steps,
                cfg=prior.cfg,
                resolution=spec.base.resolution,
                platform=platform_fingerprint(family.device),
                diffusers=diffusers.__version__,
            )
            + ".png"
        )
        for n in range(count)
    ]


def _draw(spec: RunSpec, prior: Prior, family: Family, texts: Texts, n: int, stop: Stop) -> Image.Image:
    """Draw one by itself: its last bits may depend on what is drawn together with it."""
    samples = Samples(
        prompts=(_prompt(prior, n),),
        seeds=(key(PRIOR_SEED, "class image", n),),
        steps=prior.steps,
        cfg=prior.cfg,
    )
    (drawn,) = draw_images(family, spec.model_copy(update={"samples": samples}), texts, stop)
    return drawn.image


def _is_whole(path: Path) -> bool:
    """Whether an image is there and can be decoded: a node's end may have cut it short."""
    try:
        read_image(path)
    except BadInput:
        return False
    return True


def _write(path: Path, image: Image.Image) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
