"""Words that a run teaches, put into copies of a family's tokenizers.

A word of n vectors is n tokens, ``<cat> <cat>_1 … <cat>_{n-1}``, as diffusers names them: a text is spelled
with all of them before it is tokenised.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any


class NewWords:
    """The tokenizers of a family that know some more words."""

    def __init__(self, tokenizers: Sequence[Any], vectors: Mapping[str, int]) -> None:
        """
        Args:
            tokenizers: They already know the words; see ``taught``.
            vectors: How many tokens each word is.
        """
        self.tokenizers = tuple(tokenizers)
        self.vectors = dict(vectors)

    @classmethod
    def taught(cls, tokenizers: Sequence[Any], vectors: Mapping[str, int]) -> "NewWords":
        """Teach copies of tokenizers new words.

        Raises:
            ValueError: One knows such a word already.
        """
        names = [name for word, count in vectors.items() for name in names_of(word, count)]
        copies = [copy.deepcopy(tokenizer) for tokenizer in tokenizers]
        for tokenizer in copies:
            known = tokenizer.get_vocab()
            for name in names:
                if name in known:
                    raise ValueError(f"{name} is a token of this model already")
            tokenizer.add_tokens(names)
        return cls(copies, vectors)

    def ids(self, number: int) -> list[int]:
        """Return the new tokens of tokenizer ``number``, word by word."""
        names = [name for word, count in self.vectors.items() for name in names_of(word, count)]
        return [int(i) for i in self.tokenizers[number].convert_tokens_to_ids(names)]

    def spelled(self, text: str) -> str:
        """Return a text with all tokens of each word."""
        for word, count in self.vectors.items():
            text = re.sub(re.escape(word), " ".join(names_of(word, count)), text, flags=re.IGNORECASE)
        return text


def names_of(word: str, count: int) -> list[str]:
    """Return the names of the tokens that a word is."""
    return [word, *(f"{word}_{n}" for n in range(1, count))]
