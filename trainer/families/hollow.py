"""A UNet without its deepest layers: what is cut off where, taking it out, putting it back.

Skip connections are a stack: ``conv_in``, each layer of the encoder and each downsampler put one onto it, and
each layer of the decoder takes one off. Cut ``c`` removes the ``c`` deepest layers that put, the middle, and
the ``c`` first that take. Of all that was removed, the rest needs one tensor: the hidden state that enters
the first layer of the decoder which is left. The skip connections of the others are computed as ever. The
rest keeps its modules; only the lists that name them are exchanged.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

Layer = tuple[str, ...]
"""Names of the modules that compute one skip connection, or take one, in the order of their calls."""
MIDDLE = "mid_block"


@dataclass(frozen=True, slots=True)
class Cut:
    """What training does without."""

    number: int
    """Of skip connections that go."""
    removed: tuple[str, ...]
    """Names of modules, with all that is in them."""
    last: str
    """The module whose output enters the first layer of the decoder that is left."""

    def removes(self, module: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for name in self.removed)


def cut_at(wanted: int | str, putting: list[Layer], taking: list[Layer]) -> Cut:
    """Return the cut of a number, or before a layer of the decoder by its name.

    Args:
        putting, taking: The layers that put skip connections onto the stack, and that take them off.

    Raises:
        BadInput: There is no such cut. Says which there are.
    """
    assert len(putting) == len(taking)
    number = wanted if isinstance(wanted, int) else _before(wanted, taking)
    if number >= len(taking):
        raise BadInput(
            f"base.hollow {wanted}: the model's UNet has {len(taking)} skip connections, one of which must "
            "stay",
            f"set it to at most {len(taking) - 1}",
        )
    ahead = [MIDDLE] if number == 0 else list(taking[number - 1])
    gone = [*_names(putting[len(putting) - number :]), MIDDLE, *_names(taking[:number])]
    return Cut(number, tuple(gone), ahead[-1])


def cut_of(unet: Any, wanted: int | str) -> Cut:
    """Return the cut of a UNet by its number or by the layer of the decoder before which it lies.

    Raises:
        BadInput: There is no such cut, or the UNet is not built like this.
    """
    if unet.mid_block is None:
        raise BadInput(
            "base.hollow: the model's UNet has no middle to take out: it was made smaller before",
            "leave hollow out",
        )
    return cut_at(wanted, putting(unet), taking(unet))


def putting(unet: Any) -> list[Layer]:
    """Return the layers that put skip connections onto the stack, in order."""
    found: list[Layer] = [("conv_in",)]
    for number, block in enumerate(unet.down_blocks):
        found += _layers(f"down_blocks.{number}", block)
        if block.downsamplers is not None:
            found.append((f"down_blocks.{number}.downsamplers.0",))
    return found


def taking(unet: Any) -> list[Layer]:
    """Return the layers that take skip connections off the stack, in order."""
    found: list[Layer] = []
    for number, block in enumerate(unet.up_blocks):
        found += _layers(f"up_blocks.{number}", block)
        if block.upsamplers is not None:
            found[-1] += (f"up_blocks.{number}.upsamplers.0",)
    return found


class Hollow:
    """A UNet that can be used whole, or without what a cut removes."""

    def __init__(self, unet: nn.Module, cut: Cut, device: torch.device) -> None:
        self._unet = unet
        self._cut = cut
        self._device = device
        self._removed = [unet.get_submodule(name) for name in cut.removed]
        self._given = _Given()
        self._changes = list(_changes(unet, cut, self._given))
        self._is_whole = True

    def use(self, hidden: Tensor | None) -> None:
        """Let the UNet compute with what enters the first layer that is left; None: let it compute all."""
        self._given.states = hidden
        if (hidden is None) == self._is_whole:
            return
        self._is_whole = hidden is None
        for module in self._removed:
            module.to(self._device if self._is_whole else "cpu")
        for owner, name, whole, rest in self._changes:
            setattr(owner, name, whole if self._is_whole else rest)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def hidden(self, compute: Callable[[], object]) -> Tensor:
        """Return what enters the first layer that is left while ``compute`` calls the UNet, which is whole.

        What comes after it is not computed.
        """
        self.use(None)

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            raise _Caught(output[0] if isinstance(output, tuple) else output)

        hook = self._unet.get_submodule(self._cut.last).register_forward_hook(catch)
        try:
            compute()
        except _Caught as caught:
            return caught.states
        finally:
            hook.remove()
        raise AssertionError(f"the UNet never calls {self._cut.last}")


class _Caught(Exception):
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Given(nn.Module):
    """In the place of the middle: gives what it was given."""

    states: Tensor | None = None

    def forward(self, sample: Tensor, time_embedding: Tensor) -> Tensor:
        assert self.states is not None
        return self.states


def _before(wanted: str, taking: list[Layer]) -> int:
    """The number of the cut before a layer, or before the first one of a block."""
    for number, layer in enumerate(taking):
        block, _, rest = layer[0].partition(".resnets.")
        if wanted in (block, f"{block}.{rest}"):
            return number
    blocks = sorted({layer[0].partition(".resnets.")[0] for layer in taking})
    raise BadInput(
        f"base.hollow: the model's UNet has no layer {wanted}",
        f"its blocks are {', '.join(blocks)}; or give a number from 0 to {len(taking) - 1}",
    )


def _layers(name: str, block: Any) -> list[Layer]:
    attentions = getattr(block, "attentions", ())
    return [
        (f"{name}.resnets.{n}", *((f"{name}.attentions.{n}",) if n < len(attentions) else ()))
        for n in range(len(block.resnets))
    ]


def _names(layers: Iterable[Layer]) -> list[str]:
    return [name for layer in layers for name in layer]


def _changes(unet: Any, cut: Cut, given: nn.Module) -> Iterator[tuple[Any, str, Any, Any]]:
    """Yield which attributes of which modules name something else when the cut is made, and what."""
    for side in ("down_blocks", "up_blocks"):
        blocks = getattr(unet, side)
        left = []
        for number, block in enumerate(blocks):
            rest = {
                part: _rest(block, part, f"{side}.{number}", cut) for part in _PARTS if hasattr(block, part)
            }
            if rest["resnets"]:
                left.append(block)
                yield from (
                    (block, part, getattr(block, part), kept)
                    for part, kept in rest.items()
                    if len(kept or ()) < len(getattr(block, part) or ())
                )
        if len(left) < len(blocks):
            yield unet, side, blocks, nn.ModuleList(left)
    yield unet, MIDDLE, unet.mid_block, given


_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")


def _rest(block: Any, part: str, name: str, cut: Cut) -> nn.ModuleList | None:
    """What is left of a list of modules; None instead of no module to change the size with."""
    modules = getattr(block, part)
    kept = [each for n, each in enumerate(modules or ()) if not cut.removes(f"{name}.{part}.{n}")]
    if part in ("resnets", "attentions"):
        return nn.ModuleList(kept)
    return nn.ModuleList(kept) if kept else None
