"""``RunSpec``: everything that defines a run's result, and nothing else.

The same words as in ``grid.yaml``: a run's spec is the file's ``base``, ``dataset``, ``validation``,
``samples`` and ``evaluate`` blocks with one cell of its ``parameters`` written over them. What does not
change the bytes of the adapter (where it runs, how often it checkpoints) is not here but in
``rundir.Options``.

Imports no torch: the control plane reads this module.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""diffusers' names of the attention projections: what its own LoRA scripts train."""


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Base(Frozen):
    """The model to start from and how it is trained."""

    model: str
    """A hub id, a local diffusers folder, or a single ``.safetensors`` file."""
    revision: str | None = None
    """Commit of the hub repository."""
    digest: Sha256 | None = None
    """sha256 over a local model's files, pinned at submission; a node whose files differ refuses to train."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """The frozen base is kept in this precision; the adapter always trains in fp32."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; by default what the model's scheduler configuration says."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    """LoRA scale times rank; by default the rank, a scale of 1."""
    lora_dropout: Fraction = 0.0
    targets: tuple[str, ...] = ATTENTION_TARGETS
    """Module name endings in the UNet that receive an adapter."""

    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    """Side of the square training image, in pixels."""
    max_train_steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps."""
    train_batch_size: Annotated[int, Field(ge=1)] = 1
    """Images per forward pass."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step: one step sees ``train_batch_size`` times this many images."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    adam8bit_min_size: Annotated[int, Field(ge=1)] = 4096
    """Tensors with fewer elements keep 32-bit optimizer state under ``adamw8bit`` (bitsandbytes' default)."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def lora_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def samples_per_step(self) -> int:
        """Images that one optimizer step sees."""
        return self.train_batch_size * self.gradient_accumulation_steps


class Dataset(Frozen):
    """A folder of images with captions."""

    path: str
    """Local folder: ``metadata.jsonl`` (``file_name`` and ``text``), or ``x.png`` beside ``x.txt``."""
    digest: Sha256 | None = None
    """sha256 over names and contents, pinned at submission; a node whose folder differs refuses to train."""
    caption: str | None = None
    """One caption for every image that has none."""
    trigger: str | None = None
    """Replaces ``[trigger]`` in captions and prompts."""
    caption_dropout: Fraction = 0.0
    """Share of samples trained with the empty caption."""
    random_flip: bool = False
    center_crop: bool = True
    val_fraction: Fraction = 0.1
    """Share of images held out for the validation loss; at least one image if above 0."""


class Validation(Frozen):
    """The loss by which runs are compared: at fixed images, timesteps and noise, only adapters differ."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0: only at the end."""
    timesteps: Annotated[int, Field(ge=1)] = 8
    """How many timesteps, evenly spaced over the schedule, each held-out image is noised to."""


class Samples(Frozen):
    """Images drawn from the adapter while it trains."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    negative: str = ""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between samplings; 0: only at the end."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Denoising steps of DPM-Solver multistep."""
    cfg: Annotated[float, Field(ge=0)] = 7.5


class Evaluate(Frozen):
    """A command that scores the final samples; its last line of output is a JSON object of numbers."""

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Arguments; ``{samples}`` becomes the folder of images, whose ``index.json`` names each one's prompt and
    seed."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0


class RunSpec(Frozen):
    """One run."""

    version: Literal[1] = 1
    base: Base
    dataset: Dataset
    validation: Validation = Validation()
    samples: Samples | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.evaluate and not self.samples:
            raise ValueError("evaluate scores sample images, but there is no samples block")
        if self.base.lr_warmup_steps >= self.base.max_train_steps:
            raise ValueError(
                f"base.lr_warmup_steps ({self.base.lr_warmup_steps}) must be below "
                f"base.max_train_steps ({self.base.max_train_steps})"
            )
        return self
