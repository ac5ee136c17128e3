"""JPEGs decoded at 1/2, 1/4 or 1/8 of their size, where far more pixels are stored than are wanted.

A JPEG holds blocks of 8 x 8 frequencies, and leaving out the high ones costs less than computing
them and averaging them away. What is left is resized as the whole picture would be; `MARGIN` is
what Pillow's own `reducing_gap` advises. Docs: `guides/image-files.md` has the measured
differences.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, JpegImagePlugin

MARGIN = 2
"""Pixels that each side keeps, in multiples of those that are wanted."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of the picture: its last row and column may be there in part."""
Extent = tuple[tuple[int, int], Box]
"""(height, width) of the whole picture, and where it lies in the reduced one; both as seen."""
Scale = Callable[[int, int], float]
"""By how much a picture of a height and width will be resized."""

Picture = TypeVar("Picture", bound=Image.Image | np.ndarray)

_EXTENT = "first_stage_extent"


def reduce(image: Image.Image, scale: Scale | None, upright: bool) -> Extent | None:
    """Have an image that is not loaded yet decoded smaller; `None` where it is decoded whole.

    Args:
        image: From `Image.open`.
        scale: By how much it will be resized, as it is seen; `None`: it is not.
        upright: Whether its EXIF orientation will be applied.
    """
    if scale is None or not isinstance(image, JpegImagePlugin.JpegImageFile):
        return None
    width, height = image.size
    orientation = _orientation(image) if upright else 1
    seen = (width, height) if orientation >= 5 else (height, width)
    wanted = scale(*seen) * MARGIN
    factor = next((factor for factor in (8, 4, 2) if factor * wanted <= 1), 1)
    if factor == 1 or width < factor or height < factor:
        return None
    found = image.draft(None, (width // factor, height // factor))  # type: ignore[arg-type]
    return (seen, _turned(found[1], image.size, orientation)) if found is not None else None


def marked(picture: Picture, extent: Extent | None) -> Picture:
    """A decoded picture that says what it shows, where that is more than its pixels."""
    if extent is not None and isinstance(picture, Image.Image):
        picture.info[_EXTENT] = extent
    return picture


def unmark(picture: Image.Image) -> None:
    """A part of it was taken: it shows what it shows."""
    picture.info.pop(_EXTENT, None)


def extent_of(picture: Image.Image) -> Extent:
    """The size that a picture is taken for, and where in its pixels it lies."""
    whole = ((picture.height, picture.width), (0.0, 0.0, picture.width, picture.height))
    extent: Extent = picture.info.get(_EXTENT, whole)
    return extent


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # as in decoding: damaged EXIF data turn nothing
        return 1
    return found if found in range(1, 9) else 1


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where a box lies when the image is turned by its EXIF orientation."""
    (left, top, right, bottom), (width, height) = box, size
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)
