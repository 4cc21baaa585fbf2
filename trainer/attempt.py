"""One attempt at a run, in this process: prepare, wait for the order to start, restore, train.

Preparing needs no checkpoint, so it overlaps with fetching one. Nothing is lost by dying before the first
step; until then a stop ends the process at once.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .average import Average
from .beside import NOTHING, Beside, ControlImages
from .cache import Cache, default_cache_dir
from .config import RunSpec
from .data import TrainingSet, split
from .dataset.folder import Example, held_out
from .encode import encode_images, encode_texts
from .errors import BadCheckpoint, BadInput, TrainerError
from .families import Family, load_family
from .hidden import HiddenStates
from .loop import Loop
from .methods import attach
from .methods.from_file import begin_with
from .methods.targets import left_out
from .methods.textual_inversion import check_captioned
from .narration import say
from .objective import Objective
from .optim import build_optimizer
from .orders import read_options, read_spec, wait_for_order
from .parts import Parts
from .prior import class_set, prior_of, prior_texts
from .pulse import Pulse
from .randomness import make_deterministic
from .ranks import Ranks, team
from .run_dataset import check_enough, examples_of
from .rundir import EXIT_COMPLETE, Options, RunDir, cache_folder
from .sample import sample_texts
from .snapshot import Progress, load_checkpoint
from .spec_inputs import inputs_of, moved
from .step import follow
from .stop import Stop
from .texts import CachedTexts, LiveTexts, Texts, is_cached

_ABANDONED_S = 86400.0
"""Nobody writes for so long at a file of the cache."""


def run_attempt(run_dir: RunDir, stop: Stop) -> int:
    """Train the run of a run directory and return the exit code of ``trainer.rundir``.

    Raises:
        TrainerError: Whatever ended the attempt; its ``exit_code`` says what that means.
    """
    ranks = team(run_dir, read_options(run_dir))
    try:
        return _train(run_dir, stop, ranks)
    finally:
        ranks.close()


def _train(run_dir: RunDir, stop: Stop, ranks: Ranks) -> int:
    if ranks.rank:
        ranks.meet()  # what the first has fetched and encoded meanwhile need not be done again
    else:
        stop.alive, stop.left_s = Pulse(run_dir.alive), lambda: run_dir.left_s(time.monotonic())
    with _in_words_of(read_spec(run_dir), read_options(run_dir)):
        parts = replace(prepare(run_dir, stop), ranks=ranks)
    if not ranks.rank:
        ranks.meet()
    order = wait_for_order(run_dir)
    progress = Progress()
    if order.resume is not None:
        folder = run_dir.root / order.resume
        progress = load_checkpoint(folder, parts.methods, parts.optimizer, parts.average)
        if progress.step > parts.spec.base.max_train_steps:
            raise BadCheckpoint(
                f"the checkpoint is at step {progress.step}, "
                f"the run ends at {parts.spec.base.max_train_steps}"
            )
    if ranks.rank:
        follow(parts, progress)
        return EXIT_COMPLETE
    stop.exit_at_once = False
    return Loop(parts, progress).run()


def prepare(run_dir: RunDir, stop: Stop) -> Parts:
    """Load the base model, encode the data, attach the adapter: all that does not depend on a checkpoint.

    Raises:
        BadInput: The spec, the data or the base model are wrong.
        BaseUnavailable: The hub did not answer.
    """
    spec, options = read_spec(run_dir), read_options(run_dir)
    make_deterministic(options.threads)
    with examples_of(spec, options, stop.alive) as examples:
        return _prepared(run_dir, spec, options, examples, stop)


def _prepared(run_dir: RunDir, spec: RunSpec, options: Options, examples: list[Example], stop: Stop) -> Parts:
    cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
    check_inputs(spec, options)
    local = moved(spec, options.content)
    say(f"loading {spec.base.model}")
    family = load_family(local.base, cache_dir / "hub" if cache_dir else None)
    if local.base.control:
        family.inject(local.base.control, cache_dir / "hub" if cache_dir else None)
    _check_sides(spec, family)
    cache = Cache(cache_dir or default_cache_dir())
    cache.remove_unfinished(before=time.time() - _ABANDONED_S)
    texts = _texts(spec, family, cache, examples, stop)
    say("encoding the images that no run here has met yet")
    images = encode_images(family, cache, examples, spec, stop.alive)
    class_images = class_set(local, options, family, cache, texts, stop)
    if is_cached(spec):
        family.free_text_encoders()
    train, validation = split(len(images), held_out(len(images), spec.dataset.val_fraction))
    check_enough(spec, sum(images[index].repeats for index in train))
    check_captioned(spec.base, [images[index].caption for index in train])
    training = TrainingSet(
        [images[index] for index in train],
        spec.base,
        spec.dataset,
        family.process,
        latent_pixels=family.latent_pixels,
        prior=prior_of(spec),
        class_images=class_images,
    )
    beside: Beside = NOTHING
    if spec.base.control:
        beside = ControlImages(family)
    if family.cut:
        beside = HiddenStates(spec.base, family, training, texts, cache, stop.alive)
    methods = attach(local.base, family)
    if local.base.initial_adapter:
        begin_with(Path(local.base.initial_adapter).expanduser(), methods, family)
    if gone := left_out(local.base, family):
        say(f"base.hollow: nothing is trained in {len(gone)} of the targets, such as {gone[0]}")
    return Parts(
        spec=spec,
        options=options,
        run_dir=run_dir,
        family=family,
        methods=methods,
        objective=Objective(spec.base, family.process),
        optimizer=build_optimizer(spec.base, methods.groups()),
        average=(
            Average(methods.parameters, decay, methods.begins) if (decay := spec.base.ema_decay) else None
        ),
        training=training,
        beside=beside,
        validation=[images[index] for index in validation],
        texts=texts,
        stop=stop,
    )


def _texts(spec: RunSpec, family: Family, cache: Cache, examples: list[Example], stop: Stop) -> Texts:
    if not is_cached(spec):
        return LiveTexts(family)
    captions = ["", *(example.caption for example in examples), *sample_texts(spec), *prior_texts(spec)]
    return CachedTexts(encode_texts(family, cache, captions, stop.alive), family.device)


def _check_sides(spec: RunSpec, family: Family) -> None:
    sides = {"base.resolution": spec.base.resolution}
    if spec.dataset.buckets:
        sides["dataset.bucket_step"] = spec.dataset.bucket_step
    for key, side in sides.items():
        if side % family.side_multiple:
            raise BadInput(
                f"{key} {side} is not a multiple of {family.side_multiple}, the pixels of what "
                f"{spec.base.model} sees as one piece",
                f"set it to {family.side_multiple * max(1, round(side / family.side_multiple))}",
            )


def check_inputs(spec: RunSpec, options: Options) -> None:
    """Make sure that what the run is made from, beside its dataset, is what was submitted: a resumed run
    would mix two.

    Raises:
        BadInput: Something has changed since.
    """
    for named in inputs_of(spec):
        if named.what == "dataset" or named.digest in {None, *options.content} or not named.is_here:
            continue
        path, digest = Path(named.path).expanduser(), named.digest or ""
        if (actual := named.content(path, _memory(options)).digest) != digest:
            raise BadInput(
                f"{named.what} {path} has digest {actual[:12]}, the run was submitted with "
                f"{digest[:12]}: its files differ from those at submission",
                "restore them, or submit a new sweep",
            )


def _memory(options: Options) -> Path:
    return cache_folder(options) / "digests"


@contextlib.contextmanager
def _in_words_of(spec: RunSpec, options: Options) -> Iterator[None]:
    """Name the user's paths in errors, and not those of this node's copies."""
    written = {named.digest: named.path for named in inputs_of(spec)}
    try:
        yield
    except TrainerError as error:
        message, hint = str(error), error.hint
        for digest, copy in options.content.items():
            path = written.get(digest, copy)
            message, hint = message.replace(copy, path), hint.replace(copy, path)
        raise type(error)(message, hint) from error
