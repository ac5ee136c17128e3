"""How a data set is encoded: said once, for the command and for the library."""

from dataclasses import dataclass, field
from typing import Any

from first_stage.config.types import NonNegativeInt, PositiveInt, Precision, Share
from first_stage.data import Reading
from latent_tools.format.manifest import Representation
from latent_tools.format.shards import Dtype


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How images become latents: the flags of the command and the fields of `CacheOptions`."""

    revision: str | None = None
    """Revision of the first stage on the hub."""
    representation: Representation | None = None
    """What is stored: the posterior's moments (mean and log-variance), its mean, or one sample;
    null: moments, or the latents of a first stage without a posterior. tokens: the numbers of the
    codes of a first stage with a codebook, as uint16 or uint32; mean: its latents before."""
    dtype: Dtype = "float16"
    """What it is stored as. uint8 spreads 256 levels over each sample's and channel's range; the
    error is measured and stands in the manifest."""
    flip: bool = False
    """Encode the images flipped left to right too."""
    buckets: str | None = None
    """Shapes for images of several aspect ratios: auto; kohya, just as kohya's scripts choose
    them, who do not turn photos upright; or heights and widths as in 256x256,320x192; null: one
    square."""
    update: bool = False
    """Encode again what changed since it was encoded (files, captions, labels), try again what
    could not be read, and drop what is gone from the data; the rest stays as it is."""
    columns: tuple[str, ...] | None = None
    """Columns to carry along, as in [label,caption]; null: label, class and caption under their
    usual names."""
    precision: Precision = "no"
    """Autocast type of the encoder; no: float32."""
    batch_size: PositiveInt = 32
    """Images per forward pass of one process; halved when the memory runs out."""
    unit_size: NonNegativeInt = 0
    """Images per unit: what is written at once, and encoded again after a kill; 0: as many as 256
    MiB hold, at most 1024."""
    compile: bool = False
    """Compile the encoder, once per shape."""
    seed: NonNegativeInt = 0
    """Seed of the draws when representation is sample."""


@dataclass(frozen=True)
class CacheOptions(EncodingOptions):
    """How a data set is encoded, with what a command finds out from its data and its machine."""

    resolution: PositiveInt
    """Side of the square centre crop, in pixels; with buckets, of the square whose area they
    have."""
    resize: NonNegativeInt | None
    """Shorter side after resizing, in pixels; `None`: images keep their size."""
    workers: NonNegativeInt = 0
    """Decoding processes per encoding process."""
    max_broken: Share = 0.05
    """Share of the samples that may fail before the launch stops."""
    reading: Reading | None = None
    """How files are read; `None`: plainly, into the first stage's channels."""
    opened_with: dict[str, Any] = field(default_factory=dict)
    """Image column, split and streaming that the source was opened with, for the manifest."""
    command: str = ""
    """The command line, for the manifest."""
