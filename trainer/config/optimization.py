"""The loop: batches, steps, the learning rate and the optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Fraction, Frozen, NotNegative, Positive


class OptimizationKeys(Frozen):
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side of the square training image in pixels; with buckets, the root of their area."""
    max_train_steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps."""
    train_batch_size: Annotated[int, Field(ge=1)] = 1
    """Images per forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step: one step sees ``train_batch_size`` times this many images."""
    learning_rate: Positive = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_num_cycles: Annotated[int, Field(ge=1)] = 1
    """Of ``cosine_with_restarts``."""
    lr_power: Positive = 1.0
    """Of ``polynomial``."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"] = "adamw"
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction | None = None
    """0.99 for ``lion``, else 0.999."""
    adam_epsilon: Positive = 1e-8
    weight_decay: NotNegative = 1e-2
    adam8bit_min_size: Annotated[int, Field(ge=1)] = 4096
    """Tensors with fewer elements keep 32-bit optimizer state under ``adamw8bit`` (bitsandbytes' default)."""
    prodigy_d_coef: Positive = 1.0
    """Prodigy: factor of the step size that it estimates."""
    max_grad_norm: Positive | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the trained weights, which becomes the result; see ``trainer.average``."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def beta2(self) -> float:
        """Decay of the second moment; of Lion, of its momentum."""
        if self.adam_beta2 is None:
            return 0.99 if self.optimizer == "lion" else 0.999
        return self.adam_beta2

    @property
    def samples_per_step(self) -> int:
        """Images that one optimizer step sees: the global batch."""
        return self.train_batch_size * self.gradient_accumulation_steps
