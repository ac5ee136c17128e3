"""Data sets of images as batches: the only place that knows pixels and files.

`sources` lists samples, `decode` opens them, `images` turns them into pixels, `stream` makes
batches.
"""

from first_stage.data.broken import BrokenFiles, BrokenImage, MachineFault, too_many
from first_stage.data.decode import Encoded, Picture, Reading, open_image, picture_size
from first_stage.data.faults import loader_fault
from first_stage.data.files import read_bytes
from first_stage.data.fixed import FixedImages, fixed_images
from first_stage.data.images import (
    Mirror,
    View,
    displayed,
    images_from_pixels,
    pixels_from_images,
    pixels_of,
    size_of,
)
from first_stage.data.inventory import Inventory, take_inventory
from first_stage.data.sample import Sample, Source
from first_stage.data.sources import (
    SubsetSource,
    is_builtin,
    open_inventory,
    open_source,
    split_source,
)
from first_stage.data.stream import (
    Batch,
    Later,
    StepSampler,
    TrainingStream,
    collate,
    earlier_fingerprint,
    fingerprint,
)
from first_stage.data.variation import Variation, flip_named
from first_stage.data.workers import (
    cache_workers,
    deliver,
    prepare_worker,
    spare_workers,
    start_loader,
    training_loader,
)

__all__ = [
    "Batch",
    "BrokenFiles",
    "BrokenImage",
    "Encoded",
    "FixedImages",
    "Inventory",
    "Later",
    "MachineFault",
    "Mirror",
    "Picture",
    "Reading",
    "Sample",
    "Source",
    "StepSampler",
    "SubsetSource",
    "TrainingStream",
    "Variation",
    "View",
    "cache_workers",
    "collate",
    "deliver",
    "displayed",
    "earlier_fingerprint",
    "fingerprint",
    "fixed_images",
    "flip_named",
    "images_from_pixels",
    "is_builtin",
    "loader_fault",
    "open_image",
    "open_inventory",
    "open_source",
    "picture_size",
    "pixels_from_images",
    "pixels_of",
    "prepare_worker",
    "read_bytes",
    "size_of",
    "spare_workers",
    "split_source",
    "start_loader",
    "take_inventory",
    "too_many",
    "training_loader",
]
