"""Textual inversion: words are taught to frozen text encoders (Gal et al. 2022).

Each word is one or several new rows of each CLIP text encoder's embedding, and nothing but these rows is
trained. Captions and prompts that contain the word are read with them, as ``families.new_words`` spells them.
What a row begins as is a function of the model and the seed.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Base
from ..config.textual_inversion import Token
from ..errors import BadInput
from ..families import Family
from ..families.new_rows import add_rows, table_of
from ..families.new_words import NewWords
from ..randomness import generator
from .token_norms import Rule, Usual, held, usual_of

PREFIX = "tokens."
"""Begins the names of its parameters: ``tokens.text_encoder``, (rows, width), word by word."""
VECTORS = "tokens"
"""The key of a checkpoint's header under which the number of rows of each word is, as JSON."""
DELTA = "trainable_tokens_delta"
"""PEFT's name of the rows."""


class Tokens:
    """The words of one run. See ``Method``."""

    def __init__(
        self,
        family: Family,
        name: str,
        words: NewWords,
        layers: Mapping[str, Any],
        rule: Rule = "none",
        rate: float = 1.0,
    ) -> None:
        """``layers`` are PEFT's, by text encoder."""
        self.rate = rate
        self._family, self._name, self._words = family, name, words
        self._layers, self._rule = layers, rule
        self.parameters: Mapping[str, nn.Parameter] = {
            PREFIX + encoder: getattr(layers[encoder], DELTA)[name] for encoder in sorted(layers)
        }

    @property
    def vectors(self) -> Mapping[str, int]:
        """How many rows each word has."""
        return self._words.vectors

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", VECTORS: json.dumps(self.vectors)}

    def use(self) -> None:
        self._family.words = self._words
        for layer in self._layers.values():
            layer.set_adapter([self._name])
            layer.enable_adapters(True)

    def stand_aside(self) -> None:
        self._family.words = None
        for layer in self._layers.values():
            layer.enable_adapters(False)

    def updated(self, rate: float) -> None:
        if self._rule != "none":
            for name, parameter in self.parameters.items():
                parameter.data.copy_(held(parameter.data, self._rule, self._usual[name], rate))

    @cached_property
    def _usual(self) -> Mapping[str, Usual]:
        """Of the words of the model, which stay: measured once, and not where there are no numbers."""
        encoders = self._family.text_encoders
        return {name: usual_of(table_of(encoders[name.removeprefix(PREFIX)])) for name in self.parameters}


def textual_inversion(base: Base, family: Family, name: str) -> list[Tokens]:
    """Teach a family's text encoders the run's words, as they are before the first step.

    Raises:
        BadInput: The model has other text encoders too, knows such a word, or a phrase does not fit.
    """
    if not family.takes_words:
        raise BadInput(
            f"base.train textual_inversion: {base.model} reads texts with T5 too, and no program loads words "
            "for it from a file",
            "train an adapter, with train_text_encoder",
        )
    wanted = {token.token: _vectors(token, family) for token in base.tokens}
    tokens = put_words(family, name, wanted, rule=base.token_norm, rate=_rate(base), model=base.model)
    for number, encoder in enumerate(sorted(family.text_encoders)):
        rows = [_beginning(token, wanted[token.token], family, number, base.seed) for token in base.tokens]
        parameter = tokens.parameters[PREFIX + encoder]
        parameter.data.copy_(torch.cat(rows))
    return [tokens]


def put_words(
    family: Family,
    name: str,
    vectors: Mapping[str, int],
    *,
    rule: Rule = "none",
    rate: float = 1.0,
    model: str = "this model",
) -> Tokens:
    """Give a family words with rows of zeros, in use.

    Raises:
        BadInput: The model knows such a word.
    """
    try:
        words = NewWords.taught(family.tokenizers, vectors)
    except ValueError as error:
        raise BadInput(f"base.tokens: {model}: {error}", "take another name") from error
    layers = {}
    for number, encoder in enumerate(sorted(family.text_encoders)):
        network, eos = family.text_encoders[encoder], int(family.tokenizers[number].eos_token_id)
        layers[encoder] = add_rows(network, name, words.ids(number), eos)
    tokens = Tokens(family, name, words, layers, rule, rate)
    tokens.use()
    return tokens


def rows_by_word(
    parameters: Mapping[str, Tensor], vectors: Mapping[str, int]
) -> dict[str, dict[str, Tensor]]:
    """Return the rows of each word, by word and text encoder."""
    found: dict[str, dict[str, Tensor]] = {word: {} for word in vectors}
    for name, rows_ND in parameters.items():
        if name.startswith(PREFIX):
            parts = torch.split(rows_ND.detach().cpu(), list(vectors.values()))
            for word, part in zip(vectors, parts, strict=True):
                found[word][name.removeprefix(PREFIX)] = part.clone()
    return found


def check_captioned(base: Base, captions: Sequence[str]) -> None:
    """Make sure that every word is in a caption: it would learn nothing else.

    Raises:
        BadInput: Names the word.
    """
    for token in base.tokens:
        if not any(token.token in caption.lower() for caption in captions):
            raise BadInput(
                f"base.tokens: no caption contains {token.token}, which would learn nothing",
                f'write it into the captions of the images, as in "a photo of {token.token}", or set '
                "dataset.trigger to it where they say [trigger]; dataset.caption is for images without one",
            )


def _rate(base: Base) -> float:
    return (base.token_learning_rate or base.learning_rate) / base.learning_rate


def _vectors(token: Token, family: Family) -> int:
    """How many rows a word has.

    Raises:
        BadInput: Its phrase has more tokens than that, or none.
    """
    if token.words is None:
        return token.vectors or 1
    longest = max(len(_phrase(tokenizer, token.words)) for tokenizer in family.tokenizers)
    if not longest or longest > (token.vectors or longest):
        raise BadInput(
            f"base.tokens: {token.token} has {token.vectors or 1} vectors, but its words, {token.words!r}, "
            f"are {longest} tokens",
            f"set vectors to {longest} or more, or leave it out" if longest else "take other words",
        )
    return token.vectors or longest


def _phrase(tokenizer: Any, words: str) -> list[int]:
    return [int(i) for i in tokenizer(words, add_special_tokens=False).input_ids]


def _beginning(token: Token, count: int, family: Family, number: int, seed: int) -> Tensor:
    """Return the rows that a word begins as in text encoder ``number``, (count, width)."""
    encoder = sorted(family.text_encoders)[number]
    table_VD = table_of(family.text_encoders[encoder])
    match token.init:
        case "words":
            ids = _phrase(family.tokenizers[number], token.words or "")
            return table_VD[[ids[n % len(ids)] for n in range(count)]]
        case "mean":
            return table_VD.mean(dim=0, keepdim=True).expand(count, -1)
        case "noise":
            drawn = generator(seed, f"token {token.token} {encoder}", 0)
            noise_ND = torch.randn((count, table_VD.shape[1]), generator=drawn)
            return noise_ND.to(table_VD.device) * table_VD.std()
