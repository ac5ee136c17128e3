"""The photos of the comparison: real ones that come with Python packages, or the user's own.

Photos of one scene are all on the same side, so that what is held out was never seen: not even
from another angle.
"""

from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from first_stage.data import (
    Sample,
    Source,
    images_from_pixels,
    open_image,
    pixels_of,
)
from first_stage.data.sources import ListSource
from first_stage.errors import DataError

PACKAGES = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "mvtbdata": "mvtb-data",
    "foolbox": "foolbox",
}
"""Module to what installs it."""

_CAMPUS = range(491, 516)
_TRAINING: dict[str, Sequence[str]] = {
    "skimage": ["data/astronaut.png", "data/coffee.png", "data/rocket.jpg"],
    "sklearn": ["datasets/images/china.jpg"],
    "mvtbdata": [
        *(
            f"images/campus/{'holdout/' if n in (492, 502, 508, 511, 513) else ''}P1070{n}.png"
            for n in _CAMPUS
        ),
        *(f"images/flowers{n}.png" for n in range(1, 8)),
        *(f"images/mosaic/aerial-{n}.png" for n in ("08", "09", "10")),
        *(f"images/tomato_{n}.png" for n in (124, 14, 35, 54)),
        *(
            f"images/{name}"
            for name in (
                *("58060.png", "arucoboard.png", "building2-3.png", "church.jpg"),
                *("greenscreen.png", "image3.jpg", "lab-scene.png", "parks.png", "road.png"),
                *("yellowtargets.png",),
            )
        ),
    ],
}
_HELD_OUT: dict[str, Sequence[str]] = {
    "skimage": ["data/chelsea.png"],
    "sklearn": ["datasets/images/flower.jpg"],
    "mvtbdata": [
        f"images/{name}"
        for name in (
            *("butterfly.jpg", "eiffel-1.png", "flowers9.png", "mosaic/aerialphoto.png"),
            *("notre-dame.png", "rocks2-l.png", "walls-l.png"),
        )
    ],
    "foolbox": [
        f"data/imagenet_{name}.jpg"
        for name in (
            *("00_243", "01_559", "02_438", "03_990", "04_949", "05_853", "06_609", "07_609"),
            *("08_915", "09_455", "10_541", "11_630", "12_741", "13_471", "14_129", "15_99"),
            *("16_251", "17_22", "18_317", "19_305"),
        )
    ],
}


def packaged_photos() -> tuple[Source, Source]:
    """The photos that come with packages: to train on, and held out.

    Raises:
        DataError: Naming the packages that are missing.
    """
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise DataError(
            f"the photos of the comparison come with packages; missing: {', '.join(missing)}. "
            "pip install 'first-stage[comparison]', or give your own with --data and --held_out"
        )
    return _source("photos to train on", _TRAINING), _source("held-out photos", _HELD_OUT)


def _source(name: str, files: dict[str, Sequence[str]]) -> ListSource:
    samples = []
    for module, paths in files.items():
        for path in paths:
            with resources.as_file(resources.files(module) / path) as file:
                samples.append(Sample(f"{module}/{path}", file))
    return ListSource(name, samples)


def shrunk(sources: Sequence[Source], side: int, channels: int) -> ListSource:
    """A source whose photos are decoded and shrunk once, and then kept in memory.

    Args:
        sources: The photos.
        side: Their shorter side in pixels afterwards; smaller photos stay as they are.
        channels: Channels that files are read into.
    """
    samples = [
        Sample(source.id(i), _shrink(open_image(source.read(i).image, channels), side))
        for source in sources
        for i in range(len(source))
    ]
    return ListSource(", ".join(source.name for source in sources), samples)


def _shrink(image: Image.Image, side: int) -> Image.Image:
    scale = min(side / min(image.size), 1.0)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def tiles(source: Source, side: int, channels: int) -> tuple[Tensor, list[str]]:
    """All whole square tiles of photos, without overlap, centred.

    Args:
        source: The photos; those smaller than a tile give none.
        side: Side of a tile in pixels.
        channels: Channels that files are read into.

    Returns:
        `(N, C, side, side)` in [-1, 1], and for each the id of its photo.

    Raises:
        DataError: When there is not one tile.
    """
    found: list[np.ndarray] = []
    names: list[str] = []
    for index in range(len(source)):
        sample = source.read(index)
        for tile in _tiles(pixels_of(open_image(sample.image, channels), channels), side):
            found.append(tile)
            names.append(sample.id)
    if not found:
        raise DataError(f"no photo of {source.name!r} is {side} pixels high and wide")
    dtype = np.result_type(*found)
    stacked = np.stack([tile.astype(dtype, copy=False) for tile in found])
    return images_from_pixels(torch.from_numpy(stacked)), names


def _tiles(pixels: np.ndarray, side: int) -> Iterator[np.ndarray]:
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    top, left = (pixels.shape[0] - rows * side) // 2, (pixels.shape[1] - columns * side) // 2
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * side, left + column * side
            yield pixels[y : y + side, x : x + side]
