"""Samples at fixed center crops: for validation, pictures and measuring."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from first_stage.data.broken import BrokenImage
from first_stage.data.decode import Reading, as_reading, open_image
from first_stage.data.images import View, pixels_of
from first_stage.data.sample import Source
from first_stage.errors import DataError
from first_stage.seeding import Purpose, generator


@dataclass
class FixedImages:
    """Samples at fixed centre crops: for validation, pictures and measuring.

    Attributes:
        pixels: `(N, H, W, C)` in 0..255.
        ids: The samples' ids.
        reading: How they were read.
    """

    pixels: Tensor
    ids: list[str]
    reading: Reading | None = None

    def __len__(self) -> int:
        return len(self.ids)


def fixed_images(
    source: Source, view: View, reading: Reading | int, count: int, seed: int
) -> FixedImages:
    """Decode a fixed choice of samples at centre crops.

    Args:
        source: The samples.
        view: Resize and crop.
        reading: How files are read, or just into how many channels.
        count: How many at most; fewer when the source has fewer that can be decoded.
        seed: Seed of the choice among more samples than `count`; the source's order is kept.

    Returns:
        The images.

    Raises:
        DataError: When none can be decoded.
    """
    chosen = generator(seed, Purpose.SPLIT, 1).permutation(len(source))
    found: list[tuple[int, str, np.ndarray]] = []
    problem = ""
    tried = 0
    while len(found) < count and tried < len(chosen):
        # As many as are missing, in the source's order, which costs a stream of files least.
        more = np.sort(chosen[tried : tried + count - len(found)])
        tried += len(more)
        for index in more:
            sample = source.read(int(index))
            try:
                image = open_image(sample.image, reading, view.scale)
            except BrokenImage as error:
                problem = problem or f" (first: {sample.id}: {error})"
                continue
            found.append((int(index), sample.id, pixels_of(view.apply(image)[0], reading)))
    if not found:
        raise DataError(
            f"none of the {len(source)} samples of {source.name!r} can be decoded{problem}"
        )
    found.sort(key=lambda entry: entry[0])
    dtype = np.result_type(*[pixels for _, _, pixels in found])
    stacked = np.stack([pixels.astype(dtype, copy=False) for _, _, pixels in found])
    ids = [name for _, name, _ in found]
    return FixedImages(torch.from_numpy(stacked), ids, as_reading(reading))
