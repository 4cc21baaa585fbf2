"""The adapter: which kind, how large, and which modules receive one."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Fraction, Frozen, Positive, Sha256

Rank = Annotated[int, Field(ge=1, le=1024)]
TargetSet = Literal["attention", "linear"]


class AdapterKeys(Frozen):
    adapter: Literal["lora", "loha", "lokr"] = "lora"
    """LoRA (Hu et al. 2021), LoHa (Hyeon-Woo et al. 2022) or LoKr (Yeh et al. 2024)."""
    rank: Rank = 8
    alpha: Positive | None = None
    """Scale times rank; by default the rank, a scale of 1."""
    use_dora: bool = False
    """Also train the magnitude of each output (Liu et al. 2024); ``lora`` only."""
    use_rslora: bool = False
    """Scale by alpha over the square root of the rank (Kalajdzievski 2023); ``lora`` only."""
    conv_rank: Rank | None = None
    """Rank of adapters of convolutions with kernels larger than 1 (LoCon); without it, the UNet's resnets
    receive none."""
    conv_alpha: Positive | None = None
    """Scale times rank of the convolutions; by default ``conv_rank``."""
    lora_dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped; ``lora`` only."""
    lokr_factor: Literal[-1] | Annotated[int, Field(ge=2)] = -1
    """LoKr: into what the sizes are factored; -1: as near to the square root as possible."""
    targets: TargetSet | tuple[str, ...] = "attention"
    """``attention``, ``linear`` (every linear layer of the transformer blocks), or endings of the denoiser's
    module names."""
    train_text_encoder: bool = False
    """Text encoders receive adapters of the same kind and rank on attention and MLP."""
    text_encoder_learning_rate: Positive | None = None
    """By default ``learning_rate``."""
    initial_adapter: str | None = None
    """An adapter file of diffusers, kohya or LyCORIS to go on from, instead of one that changes nothing. Its
    kind, rank, targets and whether it adapts text encoders must be these."""
    initial_adapter_digest: Sha256 | None = None

    @property
    def lora_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def lora_conv_alpha(self) -> float:
        """Alpha of the convolutions' adapters; meaningless without ``conv_rank``."""
        return float(self.conv_rank or self.rank) if self.conv_alpha is None else self.conv_alpha
