"""Settings of one run that contradict each other, whatever the model and the data are.

Each text says why, and the nearest thing that works. What depends on the model or on the images is found at
preflight, or by the trainer before its first step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .buckets import bucket_sizes
from .textual_inversion import token_contradictions
from .together import ill_assorted

if TYPE_CHECKING:
    from . import RunSpec


def contradictions(spec: "RunSpec") -> list[str]:
    """Return what cannot work together in a spec without a ``command``; empty: nothing."""
    return [
        *ill_assorted(spec),
        *_adapter(spec),
        *_hollow(spec),
        *_control(spec),
        *token_contradictions(spec),
        *_texts(spec),
        *_buckets(spec),
        *_objective(spec),
        *_prior(spec),
        *_prodigy(spec),
    ]


def _adapter(spec: "RunSpec") -> Iterator[str]:
    base = spec.base
    if base.adapter != "lora":
        lora_only = {
            "use_dora": base.use_dora,
            "use_rslora": base.use_rslora,
            "lora_dropout": base.lora_dropout,
        }
        for key, given in lora_only.items():
            if given:
                yield (
                    f"base.{key} is for LoRA, and base.adapter is {base.adapter}: leave {key} out, or set "
                    "adapter to lora"
                )
    if base.lokr_factor != -1 and base.adapter != "lokr":
        yield f"base.lokr_factor is for LoKr, and base.adapter is {base.adapter}: leave lokr_factor out"
    if base.conv_alpha is not None and base.conv_rank is None:
        yield (
            "base.conv_alpha is the alpha of convolutions, but without base.conv_rank they receive no "
            "adapter: set conv_rank too, or leave conv_alpha out"
        )
    if base.text_encoder_learning_rate is not None and not base.train_text_encoder:
        yield (
            "base.text_encoder_learning_rate is given, but text encoders are not trained: set "
            "base.train_text_encoder to true, or leave the rate out"
        )


def _hollow(spec: "RunSpec") -> Iterator[str]:
    base = spec.base
    if base.hollow is None:
        return
    if other := sorted(set(base.train) - {"adapter"}):
        yield (
            "base.hollow trains without the deepest layers of the UNet, what they compute is stored before: "
            f"base.train {other[0]} would change it. Leave hollow out, or train an adapter"
        )
    if base.train_text_encoder:
        yield (
            "base.hollow stores what the frozen model makes of each caption, which "
            "base.train_text_encoder would change: leave one of the two out"
        )


def _control(spec: "RunSpec") -> Iterator[str]:
    control, seen = spec.base.control, spec.dataset.control
    if control and seen == "none":
        yield (
            "base.control names a ControlNet, but dataset.control is none, so it has nothing to see: set "
            "that to files or edges"
        )
    if seen != "none" and not control:
        yield f"dataset.control {seen} is what a ControlNet sees: name one in base.control, or leave it out"
    if control and spec.base.hollow is not None:
        yield (
            "base.control goes into all layers of the UNet, of which base.hollow takes the deepest out: "
            "leave one of the two out"
        )


def _texts(spec: "RunSpec") -> Iterator[str]:
    dataset = spec.dataset
    if dataset.cache_text is True and spec.base.train_text_encoder:
        yield (
            "dataset.cache_text encodes captions once, but base.train_text_encoder changes what they say: "
            "leave cache_text at auto, or set train_text_encoder to false"
        )
    if dataset.cache_text is True and dataset.varied_captions:
        key = "shuffle_caption" if dataset.shuffle_caption else "tag_dropout"
        yield (
            f"dataset.cache_text encodes each caption once, but dataset.{key} makes another one for each "
            "sample: leave cache_text at auto, or leave the captions as they are"
        )


def _buckets(spec: "RunSpec") -> Iterator[str]:
    dataset, resolution = spec.dataset, spec.base.resolution
    if not dataset.buckets:
        return
    if dataset.bucket_min > dataset.bucket_max:
        yield (
            f"dataset.bucket_min ({dataset.bucket_min}) is above dataset.bucket_max ({dataset.bucket_max}): "
            "exchange them"
        )
    elif not bucket_sizes(dataset, resolution):
        step = min(dataset.bucket_step, resolution)
        yield (
            f"no bucket has sides of {dataset.bucket_min} to {dataset.bucket_max} pixels in steps of "
            f"{dataset.bucket_step} and at most the area of base.resolution {resolution}: set "
            f"dataset.bucket_min to {step * max(1, resolution // (2 * step))} or less, bucket_max to "
            f"{resolution} or more, and bucket_step to {step} or less"
        )


def _objective(spec: "RunSpec") -> Iterator[str]:
    base = spec.base
    if base.max_timestep is not None and base.min_timestep >= base.max_timestep:
        yield (
            f"no timestep lies from base.min_timestep ({base.min_timestep}) to below base.max_timestep "
            f"({base.max_timestep}): raise max_timestep to {base.min_timestep + 1} or more"
        )
    if base.zero_terminal_snr and base.prediction_type not in (None, "v_prediction"):
        yield (
            f"base.zero_terminal_snr needs v-prediction, but base.prediction_type is {base.prediction_type}: "
            "set zero_terminal_snr to false, and noise_offset to 0.05 for very dark and bright images"
        )
    if base.multires_noise_iterations and (base.noise_offset or base.adaptive_noise_scale):
        key = "noise_offset" if base.noise_offset else "adaptive_noise_scale"
        yield (
            f"base.multires_noise_iterations and base.{key} both add noise that changes an image as a whole, "
            f"and the first scales the second away: set {key} to 0"
        )
    if base.loss != "l2" and base.huber_schedule != "constant" and base.huber_c > 1:
        yield (
            f"base.huber_schedule {base.huber_schedule} lowers c from 1 to base.huber_c, which is "
            f"{base.huber_c}: set huber_schedule to constant, or huber_c to at most 1"
        )


def _prior(spec: "RunSpec") -> Iterator[str]:
    prior = spec.prior
    if prior is None or prior.path is None:
        return
    if prior.online:
        yield (
            "prior.online uses no class images: leave out prior.path, or set prior.online to false "
            "to train on them"
        )
    if not isinstance(prior.prompt, str):
        yield (
            "prior.path says nothing of which image is of which class, but prior.prompt names several: name "
            "one, or leave out prior.path to have them drawn from the base"
        )
    if "://" in prior.path:
        yield f"prior.path is a local folder, not {prior.path}: fetch it, or leave it out"


def _prodigy(spec: "RunSpec") -> Iterator[str]:
    base = spec.base
    if base.optimizer != "prodigy":
        return
    if base.learning_rate < 0.1:
        yield (
            f"base.optimizer prodigy estimates the step size and multiplies it by base.learning_rate "
            f"({base.learning_rate:g}), with which it would hardly move: set learning_rate to 1, and change "
            "prodigy_d_coef to make it bolder or more careful"
        )
    own_rate = base.text_encoder_learning_rate
    if own_rate is not None and own_rate != base.learning_rate:
        yield (
            "base.optimizer prodigy estimates one step size for all parameters, but "
            f"base.text_encoder_learning_rate ({own_rate:g}) is not base.learning_rate "
            f"({base.learning_rate:g}): leave it out, or take another optimizer"
        )
