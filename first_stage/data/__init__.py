"""Data sets of images as batches: the only place that knows pixels and files.

`sources` lists samples, `pixels` decodes them, `loader` turns them into batches.
"""

from first_stage.data.broken import BrokenFiles
from first_stage.data.faults import loader_fault
from first_stage.data.images import (
    CHANNELS,
    BrokenImage,
    View,
    images_from_pixels,
    open_image,
    pixels_from_images,
    pixels_of,
)
from first_stage.data.sources import (
    Sample,
    Source,
    SubsetSource,
    is_builtin,
    open_source,
    split_source,
)
from first_stage.data.stream import (
    Batch,
    FixedImages,
    StepSampler,
    TrainingStream,
    collate,
    fingerprint,
    fixed_images,
    spare_workers,
    start_loader,
    training_loader,
)

__all__ = [
    "CHANNELS",
    "Batch",
    "BrokenFiles",
    "BrokenImage",
    "FixedImages",
    "Sample",
    "Source",
    "StepSampler",
    "SubsetSource",
    "TrainingStream",
    "View",
    "collate",
    "fingerprint",
    "fixed_images",
    "images_from_pixels",
    "is_builtin",
    "loader_fault",
    "open_image",
    "open_source",
    "pixels_from_images",
    "pixels_of",
    "spare_workers",
    "split_source",
    "start_loader",
    "training_loader",
]
