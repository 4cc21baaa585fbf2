"""A hypernetwork: small networks before the keys and the values of attention, one pair for each width.

``k = W_k h_k(c)`` and ``v = W_v h_v(c)`` with ``h(c) = c + m MLP(c)``, shared by all attention layers whose
context ``c`` has that width (NovelAI 2022; names and shapes are those of A1111's files). They are put before
the frozen projections, and before adapters around these, with forward hooks: every attention kernel works
unchanged.

A1111 draws the last layer from a normal distribution like the others; here it starts at zero, so that a fresh
hypernetwork changes nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..config import Base
from ..errors import BadInput
from ..families import Family
from ..randomness import generator

PREFIX = "hypernetwork."
"""Begins the names of its parameters: ``hypernetwork.768_k.linear.0.weight``."""
SETTINGS = "hypernetwork"
"""The key of a file's header under which its settings are, as JSON."""
INITIAL_STD = 0.01
"""A1111's."""
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "mish": nn.Mish,
}
_CROSS, _SELF = "attn2", "attn1"


class Settings(TypedDict):
    """What rebuilds a hypernetwork beside its tensors, whose names tell the widths."""

    layers: list[float]
    activation: str
    layer_norm: bool
    dropout: float
    self_attention: bool


class Residual(nn.Module):
    """``c + m MLP(c)``. ``linear`` counts its layers as A1111 does, activations and norms among them."""

    def __init__(self, width: int, settings: Settings) -> None:
        super().__init__()
        self.multiplier = 1.0  # of what it adds, as the number in <hypernet:name:0.8>
        inner: list[nn.Module] = []
        last = len(settings["layers"]) - 2
        for place, (narrow, wide) in enumerate(pairwise(settings["layers"])):
            inner.append(nn.Linear(int(width * narrow), int(width * wide)))
            if place < last and settings["activation"] != "linear":
                inner.append(ACTIVATIONS[settings["activation"]]())
            if settings["layer_norm"]:
                inner.append(nn.LayerNorm(int(width * wide)))
            if place < last and settings["dropout"]:
                inner.append(nn.Dropout(settings["dropout"]))
        self.linear = nn.Sequential(*inner)

    def forward(self, context: Tensor) -> Tensor:
        changed: Tensor = context + self.multiplier * self.linear(context.float()).to(context.dtype)
        return changed


class Hypernetwork:
    """See ``Method``. Its hooks are on the denoiser for good, and do nothing while it stands aside."""

    rate = 1.0

    def __init__(self, settings: Settings, networks: nn.ModuleDict) -> None:
        """``networks`` by ``<width>_k`` and ``<width>_v``."""
        self.is_used = False
        self.settings = settings
        self.networks = networks
        named = ((PREFIX + name, parameter) for name, parameter in networks.named_parameters())
        self.parameters: Mapping[str, nn.Parameter] = dict(sorted(named))

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", SETTINGS: json.dumps(self.settings, sort_keys=True)}

    def use(self) -> None:
        self.is_used = True
        self.networks.requires_grad_(True)  # an adapter that is attached later freezes all that is no adapter

    def stand_aside(self) -> None:
        self.is_used = False

    def updated(self, rate: float) -> None:
        pass


def hypernetworks(base: Base, family: Family, name: str) -> list[Hypernetwork]:
    """Put the run's hypernetwork before the attention of its denoiser; a function of the seed.

    Raises:
        BadInput: The denoiser has no such attention, or a layer would have no width.
    """
    settings = Settings(
        layers=list(base.hypernetwork_layers),
        activation=base.hypernetwork_activation,
        layer_norm=base.hypernetwork_layer_norm,
        dropout=base.hypernetwork_dropout,
        self_attention=base.hypernetwork_self_attention,
    )
    made = put_before_attention(family, name, settings, base.model)
    _initialise(made.networks, base.seed)
    return [made]


def put_before_attention(family: Family, name: str, settings: Settings, model: str) -> Hypernetwork:
    """Put a hypernetwork with numbers of no meaning before the attention of a family's denoiser, active.

    Raises:
        BadInput: See ``hypernetworks``.
    """
    if family.denoiser_prefix != "unet":
        raise BadInput(
            f"base.train hypernetwork: {model} attends to image and text at once; a hypernetwork changes "
            "what a UNet attends to",
            "take a Stable Diffusion 1.x, 2.x or XL, or train an adapter",
        )
    places = list(_projections(family.denoiser, self_attention=settings["self_attention"]))
    widths = sorted({module.in_features for _, module in places})
    for width in widths:
        if thin := [multiple for multiple in settings["layers"] if int(width * multiple) < 1]:
            raise BadInput(f"base.hypernetwork_layers: {thin[0]:g} times {width} is no width", "take more")
    networks = nn.ModuleDict(
        {f"{width}_{part}": Residual(width, settings) for width in widths for part in "kv"}
    ).to(family.device)
    # Within the denoiser: training and evaluation are told to it.
    all_of_them: Any = getattr(family.denoiser, "hypernetworks", None)
    if all_of_them is None:
        all_of_them = nn.ModuleDict()
        family.denoiser.add_module("hypernetworks", all_of_them)
    all_of_them[name] = networks
    made = Hypernetwork(settings, networks)
    for part, module in places:
        module.register_forward_pre_hook(_before(made, networks[f"{module.in_features}_{part}"]))
    made.use()
    return made


def _projections(denoiser: nn.Module, *, self_attention: bool) -> Iterator[tuple[str, Any]]:
    """Yield ``k`` or ``v`` and the module for each projection, with an adapter around it if it has one."""
    kinds = (_CROSS, _SELF) if self_attention else (_CROSS,)
    for name, module in denoiser.named_modules():
        attention, _, last = name.rpartition(".")
        if last in ("to_k", "to_v") and attention.rpartition(".")[2] in kinds:
            yield last[-1], module


def _before(hypernetwork: Hypernetwork, network: nn.Module) -> Callable[..., tuple[Tensor, ...] | None]:
    def changed(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (network(inputs[0]), *inputs[1:]) if hypernetwork.is_used else None

    return changed


def _initialise(networks: nn.ModuleDict, seed: int) -> None:
    drawn = 0
    for network in networks.values():
        inner: Sequence[nn.Module] = [m for m in network.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
        for layer in inner:
            if isinstance(layer, nn.Linear):
                numbers = torch.empty(layer.weight.shape)
                nn.init.normal_(numbers, std=INITIAL_STD, generator=generator(seed, "hypernetwork", drawn))
                layer.weight.data.copy_(numbers)
                layer.bias.data.zero_()
                drawn += 1
        last: Any = inner[-1]  # with norms, the last of these: behind a zero layer it would divide by nothing
        last.weight.data.zero_()
