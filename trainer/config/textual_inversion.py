"""Textual inversion: new words of the text encoders, and when in a run they and adapters are trained."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .values import Fraction, Frozen, Positive

if TYPE_CHECKING:
    from . import RunSpec
    from .base import Base
    from .trained import Trained

TOKEN_PATTERN = r"^<[a-z0-9][a-z0-9_-]*>$"
Share = Annotated[float, Field(gt=0, le=1)]
Vectors = Annotated[int, Field(ge=1, le=75)]


def _word(given: Any) -> Any:
    if isinstance(given, str) and given and not (given.startswith("<") and given.endswith(">")):
        raise ValueError(f"a token is written in angle brackets, which no other word has: <{given.lower()}>")
    return given


class Token(Frozen):
    """A word that is taught."""

    token: Annotated[str, Field(pattern=TOKEN_PATTERN), BeforeValidator(_word)]
    """In angle brackets and lower case, as captions and prompts spell it: ``<cat>``."""
    vectors: Vectors | None = None
    """How many rows of the embedding it has: as many tokens it takes in a prompt. By default one, or one for
    each token of ``words``."""
    init: Literal["words", "mean", "noise"] = "words"
    """What it begins as: ``words``, the mean of all rows, or noise of their standard deviation."""
    words: Annotated[str, Field(min_length=1)] | None = None
    """The phrase whose tokens it begins as, one after the other and in turns; of ``init: words``."""


class TextualInversionKeys(Frozen):
    tokens: tuple[Token, ...] = ()
    """``textual_inversion``: the words that are taught (Gal et al. 2022)."""
    token_learning_rate: Positive | None = None
    """Of the tokens; by default ``learning_rate``."""
    token_norm: Literal["none", "decay", "retract", "project"] = "none"
    """What keeps the tokens as long as words are, after each step: see ``methods.token_norms``."""
    tokens_until: Share = 1.0
    """Tokens are trained up to this share of the steps, and are then left as they are."""
    adapter_from: Fraction = 0.0
    """Adapters are trained from this share of the steps on. Both 0.5: pivotal tuning."""


def steps_of(base: "Base", what: "Trained") -> range:
    """Return the optimizer steps, counted from 0, at which something of a run is trained."""
    total = base.max_train_steps
    match what:
        case "textual_inversion":
            return range(round(base.tokens_until * total))
        case "adapter":
            return range(round(base.adapter_from * total), total)
        case _:
            return range(total)


def token_contradictions(spec: "RunSpec") -> Iterator[str]:
    """Yield what cannot work of the tokens of a run, each with the nearest thing that works."""
    base = spec.base
    if "textual_inversion" not in base.train:
        return
    yield from _of_tokens(base.tokens)
    yield from _of_times(base)
    if spec.dataset.cache_text is True:
        yield (
            "dataset.cache_text encodes captions once, but base.train textual_inversion changes what they "
            "say: leave cache_text at auto"
        )
    if base.optimizer == "prodigy":
        yield from _of_prodigy(base)


def _of_tokens(tokens: tuple[Token, ...]) -> Iterator[str]:
    if not tokens:
        yield (
            "base.train textual_inversion teaches words, but base.tokens names none: "
            "tokens: [{token: <cat>, words: cat}]"
        )
    names = [token.token for token in tokens]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"base.tokens names {twice[0]} twice: give it more vectors, or leave one out"
    for token in tokens:
        if token.init == "words" and token.words is None:
            yield (
                f"base.tokens: {token.token} begins as words, but none are given: add words, a phrase, or "
                "set init to mean or noise"
            )
        if token.init != "words" and token.words is not None:
            yield f"base.tokens: {token.token} begins as {token.init}: leave words out, or leave init out"


def _of_times(base: "Base") -> Iterator[str]:
    others = [what for what in base.train if what != "textual_inversion"]
    tokens, adapter = steps_of(base, "textual_inversion"), steps_of(base, "adapter")
    if base.adapter_from and "adapter" not in base.train:
        yield "base.adapter_from is of adapters, and none is trained: leave it out, or add adapter to train"
    if base.tokens_until < 1 and not others:
        yield (
            f"base.tokens_until {base.tokens_until:g}: nothing would be trained after it. Leave it out, or "
            "add adapter to train"
        )
    elif others == ["adapter"] and adapter.start > tokens.stop:
        yield (
            f"between base.tokens_until ({base.tokens_until:g}) and base.adapter_from ({base.adapter_from:g})"
            " nothing would be trained: set both to the same share"
        )
    for key, steps in (("tokens_until", tokens), ("adapter_from", adapter)):
        if not steps:
            yield (
                f"base.{key} {getattr(base, key):g} leaves none of {base.max_train_steps} steps: take "
                "another share, or more steps"
            )


def _of_prodigy(base: "Base") -> Iterator[str]:
    if base.tokens_until < 1 or base.adapter_from:
        yield (
            "base.optimizer prodigy estimates one step size, which never shrinks, for all that it trains: "
            "what begins later would have that of the tokens. Take another optimizer, or leave tokens_until "
            "and adapter_from out"
        )
    if base.token_learning_rate not in (None, base.learning_rate):
        yield (
            "base.optimizer prodigy estimates one step size for all parameters, but base.token_learning_rate "
            f"({base.token_learning_rate:g}) is not base.learning_rate ({base.learning_rate:g}): leave it "
            "out, or take another optimizer"
        )
