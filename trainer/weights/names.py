"""Takes the module names in adapter files apart without a base model. Pure.

kohya's scripts and LyCORIS join a module's path with ``_``. The words of which diffusers' UNets and CLIP's
text encoders make their paths are few, and no row of them reads as another row: so the path is found again.
A path of other words is of no family that is known here, however it is written.
Where the base is at hand, ``methods.module_names`` knows every name for certain.
"""

import re

from ..methods.module_names import ROOTS, TEXT_LEVEL, Module

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_UNET = (
    *("down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers"),
    *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
    *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
)
_STABILITY = (
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "op", "time_embed", "label_emb", "out"),
)
_TEXT = (
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "text_projection"),
)
_SD3 = (
    *("transformer_blocks", "attn", "attn2", "to_q", "to_k", "to_v", "to_out", "to_add_out"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "ff", "ff_context", "net", "proj"),
    *("norm1", "norm1_context", "norm_out", "linear", "proj_out", "pos_embed", "context_embedder"),
    *("time_text_embed", "timestep_embedder", "text_embedder", "linear_1", "linear_2"),
)
_T5 = (
    *("encoder", "block", "layer", "SelfAttention", "q", "k", "v", "o"),
    *("DenseReluDense", "wi_0", "wi_1", "wo"),
)
_WORDS_OF = {
    "unet": frozenset(_UNET),
    "transformer": frozenset(_SD3),
    "text_encoder": frozenset(_TEXT),
    "text_encoder_2": frozenset(_TEXT),
    "text_encoder_3": frozenset(_T5),
}
_WORDS = sorted((*_UNET, *_STABILITY, *_TEXT), key=len, reverse=True)
_WORD = re.compile(rf"({'|'.join(_WORDS)}|\d+)(?:_|$)")
_LAYERS_PER_BLOCK = 2
"""Of every UNet that was published with Stability's names."""
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def module_of(called: str) -> Module | None:
    """Return the module that a file calls so, by diffusers' names; None if no known family has such a name.

    Of CLIP, the first text encoder has no level ``text_model`` (as in transformers 5), the others have it.
    """
    network, _, path = called.partition(".")
    if network not in ROOTS:
        prefix = next((start for start in _PREFIXES if called.startswith(start)), None)
        if prefix is None:
            return None
        network, path = _PREFIXES[prefix], _taken_apart(called.removeprefix(prefix))
        path = _of_stability(path) if network == "unet" else path
    return (network, _level(network, path)) if _is_known(network, path) else None


def _is_known(network: str, path: str) -> bool:
    first, *words = path.split(".")
    known = _WORDS_OF[network]
    return first in ROOTS[network] and all(word in known or word.isdecimal() for word in words)


def _taken_apart(joined: str) -> str:
    """Return the path with points; nothing if it is made of other words."""
    words, at = [], 0
    while at < len(joined):
        word = _WORD.match(joined, at)
        if word is None:
            return ""
        words.append(word[1])
        at = word.end()
    return ".".join(words)


def _level(network: str, name: str) -> str:
    if network in ("text_encoder", "text_encoder_2"):
        while name.startswith(TEXT_LEVEL):  # twice, where a program added it to what had it
            name = name.removeprefix(TEXT_LEVEL)
    return TEXT_LEVEL + name if network == "text_encoder_2" and name.startswith("encoder.") else name


def _of_stability(path: str) -> str:
    """Return diffusers' name of a module of a UNet that may be called as in Stability's own code."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    side, *numbers = path.split(".")
    if side == "middle_block" and len(numbers) > 1 and numbers[0] in _MIDDLE:
        kind, rest = _MIDDLE[numbers[0]], ".".join(numbers[1:])
        return f"mid_block.{kind}.{_RESNET.get(rest, rest)}"
    if side not in ("input_blocks", "output_blocks") or len(numbers) < 3 or not numbers[0].isdecimal():
        return path
    place, inner, rest = int(numbers[0]) - (side == "input_blocks"), numbers[1], ".".join(numbers[2:])
    block, layer = divmod(place, _LAYERS_PER_BLOCK + 1)
    blocks = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{blocks}.downsamplers.0.conv"
    if rest == "conv":
        return f"{blocks}.upsamplers.0.conv"
    if inner == "0":
        return f"{blocks}.resnets.{layer}.{_RESNET.get(rest, rest)}"
    return f"{blocks}.attentions.{layer}.{rest}"
