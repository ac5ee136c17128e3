"""How a data set is encoded."""

from dataclasses import dataclass, field
from typing import Any, Literal

from first_stage.data import Reading

Representation = Literal["moments", "mean", "sample"]
Dtype = Literal["float16", "bfloat16", "float32", "uint8"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class CacheOptions:
    """How a data set is encoded; `scripts/cache_latents.py --help` says more of each.

    Attributes:
        resolution: Side of the square centre crop, or of the square whose area buckets have.
        resize: Shorter side after resizing; `None` keeps sizes.
        reading: How files are read; `None`: plainly, into the first stage's channels.
        representation: `None` stores moments where the first stage has a posterior, else latents.
        dtype: What latents are stored as.
        flip: Encode the flipped pixels too.
        buckets: `None`, `auto`, or shapes as in `256x256,320x192`.
        columns: Columns to carry; `None` takes labels, classes and captions.
        precision: Autocast type of the encoder.
        batch_size: Samples per forward pass.
        unit_size: Samples per unit; 0 takes as many as 256 MiB hold, at most 1024.
        workers: Decode workers per process.
        max_broken: Share of the samples that may fail before the launch stops.
        compile: Use `torch.compile`.
        seed: Of the draws that `sample` stores.
        revision: The first stage's hub revision.
        update: Encode what changed since, and drop what is gone.
        opened_with: Image column, split and streaming that the source was opened with, for the
            manifest.
        command: The command line, for the manifest.
    """

    resolution: int
    resize: int | None
    reading: Reading | None = None
    representation: Representation | None = None
    dtype: Dtype = "float16"
    flip: bool = False
    buckets: str | None = None
    columns: tuple[str, ...] | None = None
    precision: Precision = "no"
    batch_size: int = 32
    unit_size: int = 0
    workers: int = 0
    max_broken: float = 0.05
    compile: bool = False
    seed: int = 0
    revision: str | None = None
    update: bool = False
    opened_with: dict[str, Any] = field(default_factory=dict)
    command: str = ""
