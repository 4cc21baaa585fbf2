"""Taught words as others read them, each file proven by loading it with diffusers.

diffusers, hf           {"<word>": rows}       SD 1.x and 2.x
kohya and web interfaces {"emb_params": rows}  SD 1.x and 2.x
all                     {"clip_l": rows, "clip_g": rows}   SDXL
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Base, RunSpec
from ..errors import BadInput
from ..families import Family, family_of
from ..families.new_rows import read_pooled_at
from ..families.new_words import NewWords
from ..families.source import load_pipeline
from ..methods.textual_inversion import PREFIX, Tokens, put_words, rows_by_word
from ..tensor_file import read, to_bytes
from .files import DTYPES, Dtype, in_dtype, put
from .headers import Amount, description
from .token_files import ENCODERS, KOHYA, WORD, rows_of, stem_of, tensors_of
from .trained import Trained, in_fp32, on_base, outputs_of, trained_part
from .verify import EPSILON, ExportFailed, compare_outputs


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """What is exported, and what every exported file must give back."""

    trained: Trained
    rows: Mapping[str, Mapping[str, Tensor]]
    """By word and text encoder."""
    said: Mapping[str, Mapping[str, Tensor]]
    """By word: what the base makes of a text with it."""


def trained_tokens(checkpoint_dir: Path, spec: RunSpec) -> TrainedTokens:
    """Load the words of a verified checkpoint on its base, in fp32, without what else was trained.

    Raises:
        BadCheckpoint: The checkpoint is damaged, or does not belong to this spec.
        BadInput, BaseUnavailable: The base cannot be loaded.
    """
    with on_base(checkpoint_dir, spec, Tokens) as (family, (tokens,)):
        trained = trained_part(spec, "textual_inversion", checkpoint_dir, family)
        said = {word: outputs_of(family, _text(word)) for word in tokens.vectors}
    return TrainedTokens(trained, rows_by_word(tokens.parameters, tokens.vectors), said)


def write_tokens(
    own: TrainedTokens, folder: Path, to: str, base: Base, *, name: str, dtype: Dtype, metadata: Amount
) -> dict[str, Path]:
    """Write a file for each word into a folder and return them by word.

    Args:
        base: The run's, which says what else it trained.

    Raises:
        BadInput: ``dtype`` cannot hold a number, or a file cannot be written.
    """
    written = {}
    for word, rows in own.rows.items():
        tensors = in_dtype(tensors_of(rows, word if to in ("diffusers", "hf") else KOHYA), dtype)
        header = {WORD: word, **description(own.trained, name, metadata)} if metadata != "none" else {}
        written[word] = put(folder, f"{stem_of(word, base, name)}.safetensors", to_bytes(tensors, header))
    return written


def verify_tokens(word: str, path: Path, own: TrainedTokens, dtype: Dtype) -> dict[str, Any]:
    """Load a written file with diffusers onto its base, loaded anew, and return what was found.

    Raises:
        ExportFailed: It does not load, or a number or a prediction differs.
    """
    base = in_fp32(own.trained.spec).base
    rows = own.rows[word]
    try:
        family = _by_diffusers(word, path, base)
    except (BadInput, ValueError, KeyError, RuntimeError, OSError, SafetensorError) as problem:
        raise ExportFailed(f"{path}: {problem}") from problem
    assert family.words is not None
    for number, encoder in enumerate(sorted(family.text_encoders)):
        network: Any = family.text_encoders[encoder]
        got = network.get_input_embeddings().weight[family.words.ids(number)].cpu()
        if not torch.equal(got, rows[encoder].to(DTYPES[dtype]).float()):
            raise ExportFailed(f"{path}: {word} differs from the checkpoint's in {encoder}")
    worst = compare_outputs(path, outputs_of(family, _text(word)), own.said[word], EPSILON[DTYPES[dtype]])
    return {
        "token": word,
        "vectors": len(next(iter(rows.values()))),
        "dtype": dtype,
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "max_prediction_error": worst,
    }


def put_files(files: list[Path], family: Family, name: str) -> list[str]:
    """Give a family the words of files, in use, and return the words.

    Raises:
        BadInput: A file holds no word, or one of another base.
    """
    rows = {}
    for path in files:
        try:
            tensors, header = read(path)
            rows[header.get(WORD) or f"<{path.stem.lower()}>"] = rows_of(tensors)
        except (OSError, SafetensorError, ValueError) as error:
            raise BadInput(f"{path}: {error}", "give the file of an embedding") from error
    counts = {word: len(next(iter(each.values()))) for word, each in rows.items()}
    if not rows:
        return []
    tokens = put_words(family, name, counts)
    for parameter_name, parameter in tokens.parameters.items():
        encoder = parameter_name.removeprefix(PREFIX)
        given = [each.get(encoder) for each in rows.values()]
        if any(part is None or part.shape[1] != parameter.shape[1] for part in given):
            raise BadInput(f"{', '.join(map(str, files))}: rows of another base model's {encoder}")
        parameter.data.copy_(torch.cat([part for part in given if part is not None]).float())
        parameter.requires_grad_(False)
    return list(rows)


def is_of_word(path: Path) -> bool:
    """Whether a file holds a word: ours, or one whose tensors say so."""
    try:
        with safe_open(path, framework="pt") as file:
            names, header = set(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return WORD in header or (bool(names) and names <= {KOHYA, *ENCODERS.values()})


def _by_diffusers(word: str, path: Path, base: Base) -> Family:
    pipeline = load_pipeline(base)
    encoders = {n: part for n, part in sorted(pipeline.components.items()) if n.startswith("text_encoder")}
    rows = rows_of(read(path)[0])
    if len(encoders) == 1:
        pipeline.load_textual_inversion(str(path.parent), weight_name=path.name, token=word)
    else:
        for encoder, network in encoders.items():
            tokenizer = pipeline.components[encoder.replace("text_encoder", "tokenizer")]
            pipeline.load_textual_inversion(
                rows[encoder], token=word, text_encoder=network, tokenizer=tokenizer
            )
    family = family_of(pipeline, base)
    family.words = NewWords(family.tokenizers, {word: len(next(iter(rows.values())))})
    for number, encoder in enumerate(sorted(family.text_encoders)):
        read_pooled_at(family.text_encoders[encoder], int(family.tokenizers[number].eos_token_id))
    return family


def _text(word: str) -> str:
    return f"a photo of {word}, seen from afar"
