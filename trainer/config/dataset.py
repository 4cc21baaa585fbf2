"""The images and captions of a run, and what is done with them."""

from typing import Annotated, Literal

from pydantic import Field

from .values import Fraction, Frozen, Positive, Sha256


class Concept(Frozen):
    """A subfolder of the dataset with settings of its own."""

    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How often each of its images comes in an epoch."""
    loss_weight: Positive = 1.0
    caption: str | None = None
    """For its images that have none; instead of ``dataset.caption``."""
    trigger: str | None = None
    """Instead of ``dataset.trigger``."""


class Dataset(Frozen):
    """Images with captions."""

    path: str
    """A local folder (``metadata.jsonl``, captions beside images, or kohya's ``10_name`` folders), a data
    set on the hub (``hub://owner/name``), or a prefix of a bucket (``s3://bucket/prefix``)."""
    digest: Sha256 | None = None
    """sha256 over names and contents, pinned at submission; a node whose folder differs refuses to train."""
    revision: str | None = None
    """Commit of a data set on the hub."""
    split: str = "train"
    """Of a data set on the hub."""
    image_column: str = "image"
    caption_column: str = "text"
    """Columns of a data set on the hub."""
    caption: str | None = None
    """One caption for every image that has none."""
    trigger: str | None = None
    """Replaces ``[trigger]`` in captions and prompts."""
    concepts: dict[str, Concept] = Field(default_factory=dict)
    """Settings by subfolder."""
    caption_dropout: Fraction = 0.0
    """Share of samples trained with the empty caption."""
    shuffle_caption: bool = False
    """Put the tags of a caption into another order for each sample."""
    caption_separator: Annotated[str, Field(min_length=1)] = ","
    """Between tags."""
    keep_tokens: Annotated[int, Field(ge=0)] = 0
    """So many tags at the start are neither moved nor dropped."""
    tag_dropout: Fraction = 0.0
    """Share of the tags of a sample that is left out."""
    cache_text: Literal["auto"] | bool = "auto"
    """Encode each caption once. ``auto``: unless captions vary or text encoders or tokens are trained."""
    random_flip: bool = False
    center_crop: bool = True
    buckets: bool = False
    """Keep each image's aspect ratio as far as it goes: images of like shape are trained together."""
    bucket_min: Annotated[int, Field(ge=8, multiple_of=8)] = 256
    bucket_max: Annotated[int, Field(ge=8, multiple_of=8)] = 2048
    """The shortest and the longest side of a bucket, in pixels."""
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Sides are multiples of this."""
    masks: Literal["none", "alpha", "files"] = "none"
    """What counts of an image: all; by its alpha channel; or ``x.mask.png`` beside ``x.png``, white."""
    control: Literal["none", "files", "edges"] = "none"
    """What a ControlNet (``base.control``) sees: ``x.control.png`` beside ``x.png``, or the image's own edges
    (Pillow's ``FIND_EDGES``: grey, thicker than Canny's)."""
    val_fraction: Fraction = 0.1
    """Share of images held out for the validation loss; at least one image if above 0."""

    def __hash__(self) -> int:  # a mapping has none of its own
        return hash(self.model_dump_json())

    @property
    def varied_captions(self) -> bool:
        """Whether captions are put together anew for each sample, so that there are too many to cache."""
        return self.shuffle_caption or self.tag_dropout > 0


Prompt = Annotated[str, Field(min_length=1)]


class Prior(Frozen):
    """Prior preservation (Ruiz et al. 2023): what the base makes of the class's name must stay as it is."""

    prompt: Prompt | Annotated[tuple[Prompt, ...], Field(min_length=1)]
    """The class, as in ``a photo of a dog``; several, if more than one is to stay: they take turns."""
    weight: Positive = 1.0
    """Of its loss beside that of the images."""
    online: bool = False
    """No class images: the model must predict, at the training images, what the base predicts."""
    images: Annotated[int, Field(ge=1)] = 100
    """How many class images are drawn from the base; cached."""
    path: str | None = None
    """A folder of class images to use; what is missing to ``images`` is drawn from the base."""
    digest: Sha256 | None = None
    steps: Annotated[int, Field(ge=1)] = 25
    cfg: Annotated[float, Field(ge=0)] = 7.5
    """Denoising steps and guidance with which class images are drawn."""

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt
