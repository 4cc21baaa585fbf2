"""What files of taught words are called, and how they are used. Pure.

A file holds one word, as A1111 and ComfyUI have it, which know a word by its file's name.
"""

from collections.abc import Mapping

from torch import Tensor

from ..config import Base

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What SDXL's files call its two text encoders."""
KOHYA = "emb_params"
"""What kohya's files call the rows for the one text encoder of SD 1.x and 2.x."""
WORD = "orchestrate.token"
"""In a file's header: the word."""


def stem_of(word: str, base: Base, name: str) -> str:
    """Return what the file of a word is called: as the word, beside an adapter as the adapter."""
    bare = word.strip("<>")
    if "adapter" not in base.train:
        return bare
    return f"{name}_emb" if len(base.tokens) == 1 else f"{name}_emb_{bare}"


def tensors_of(rows: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """Return the tensors of a word's file from its rows by text encoder.

    Args:
        key: What the rows are called where there is one text encoder.
    """
    if len(rows) == 1:
        return {key: next(iter(rows.values()))}
    return {ENCODERS[encoder]: tensor for encoder, tensor in rows.items()}


def rows_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows by text encoder from the tensors of a word's file.

    Raises:
        ValueError: They are no word.
    """
    found = {encoder: tensors[key] for encoder, key in ENCODERS.items() if key in tensors}
    if not found and len(tensors) == 1:
        found = {"text_encoder": next(iter(tensors.values()))}
    if not found or any(tensor.ndim != 2 for tensor in found.values()):
        raise ValueError("it holds no rows of an embedding")
    return found


def called(word: str, stem: str, to: str) -> str:
    """Return how a word is written in a prompt where it was exported to."""
    return {"a1111": stem, "comfyui": f"embedding:{stem}"}.get(to, word)


def loading(base: Base, name: str, family: str) -> list[str]:
    """Return the lines of a Python program that load a run's words into a diffusers pipeline."""
    lines = []
    for token in base.tokens:
        file = f"{stem_of(token.token, base, name)}.safetensors"
        if family != "sdxl":
            named = f'weight_name="{file}", token="{token.token}"'
            lines.append(f'pipeline.load_textual_inversion("<this folder>", {named})')
            continue
        lines.append(f'rows = load_file("<this folder>/{file}")')
        for number, key in (("", "clip_l"), ("_2", "clip_g")):
            lines += [
                "pipeline.load_textual_inversion(",
                f'    rows["{key}"], token="{token.token}",',
                f"    text_encoder=pipeline.text_encoder{number}, tokenizer=pipeline.tokenizer{number},",
                ")",
            ]
    if lines and family == "sdxl":
        lines += [
            "# an old configuration takes the pooled vector where the largest token is: at the new one",
            "encoder = pipeline.text_encoder_2",
            'getattr(encoder, "text_model", encoder).eos_token_id = pipeline.tokenizer_2.eos_token_id',
        ]
    return lines


def explained(base: Base, name: str) -> str:
    """Return how a run's words are used in web interfaces."""
    said = []
    for token in base.tokens:
        stem = stem_of(token.token, base, name)
        said.append(
            f"- **{token.token}** is `{stem}.safetensors`: put it into `embeddings`, and write `{stem}` in "
            f"A1111 and Forge, `embedding:{stem}` in ComfyUI."
        )
    return "\n".join(said)
