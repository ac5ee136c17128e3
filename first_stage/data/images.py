"""From pictures to pixels and from pixels to what networks see; `decode` opens the files.

Between the file and the device pixels are `(H, W, C)` in 0..255 (uint8, or float32 where a file has
more than 8 bits per value); `images_from_pixels` turns batches of them into float32 in [-1, 1],
`pixels_from_images` turns images back with rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from first_stage.data.decode import Picture, Reading, as_reading
from first_stage.data.reduced import Box, extent_of, unmark


def pixels_of(picture: Picture, reading: Reading | int) -> np.ndarray:
    """The pixels of a picture from `open_image`.

    Args:
        picture: An image, or an array `(H, W, C)`; of one channel it is gray for 3 or 4.
        reading: How it was read, or just the number of channels.

    Returns:
        `(H, W, C)`, uint8 in 0..255, or float32 in 0..255.
    """
    channels = as_reading(reading).channels
    array = np.array(picture)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] != channels:
        array = np.repeat(array, min(channels, 3), axis=2)
        if channels == 4:
            array = np.concatenate([array, np.full_like(array[..., :1], 255)], axis=2)
    return array


def displayed(channels: int, display: tuple[int, ...] | None = None) -> list[int]:
    """Which channels pictures and networks for colors are given.

    Args:
        channels: How many there are.
        display: Those asked for, one or three; `None` takes gray, RGB and RGBA whole, the first
            one of two, and the first three of more.
    """
    if display is not None:
        return list(display)
    return list(range({2: 1}.get(channels, channels if channels <= 4 else 3)))


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width) of a picture; of the whole one, where it was decoded smaller."""
    if isinstance(picture, Image.Image):
        return extent_of(picture)[0]
    return int(picture.shape[0]), int(picture.shape[1])


@dataclass(frozen=True)
class Mirror:
    """One of the eight ways to lay a crop: mirrored, turned, or both.

    Attributes:
        horizontal: Left to right.
        vertical: Top to bottom; after the first.
        transposed: Rows become columns; after the others, and for square crops only.
    """

    horizontal: bool = False
    vertical: bool = False
    transposed: bool = False

    def apply(self, picture: Picture) -> Picture:
        """Lay a picture so."""
        if isinstance(picture, Image.Image):
            if self.horizontal:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.vertical:
                picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            return picture.transpose(Image.Transpose.TRANSPOSE) if self.transposed else picture
        if self.horizontal:
            picture = picture[:, ::-1]
        if self.vertical:
            picture = picture[::-1]
        return np.swapaxes(picture, 0, 1) if self.transposed else picture


@dataclass(frozen=True)
class View:
    """Which part of an image is seen: resize of the shorter side, then a crop, then a flip.

    Attributes:
        resolution: Side of the square crop, in pixels.
        resize: Shorter side after resizing (bicubic, antialiased), in pixels; `None` leaves images
            as they are. An image smaller than the crop is always enlarged until the crop fits.
        shape: (height, width) of the crop instead of a square: the image is resized until it just
            covers the crop, and `resize` does not matter.
        shrink: Resize to this share of that, in (0, 1], as far as the crop still fits.
    """

    resolution: int
    resize: int | None
    shape: tuple[int, int] | None = None
    shrink: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop."""
        return self.shape or (self.resolution, self.resolution)

    def scale(self, height: int, width: int) -> float:
        """By how much an image of this size is resized."""
        crop_height, crop_width = self.size
        scale = max(crop_height / height, crop_width / width)
        if self.shape is None:
            side = min(width, height)
            scale = max(scale, self.shrink * (self.resize or side) / side)
        return scale

    def apply(
        self,
        image: Picture,
        u: float | None = None,
        v: float | None = None,
        flip: bool | Mirror = False,
    ) -> tuple[Picture, tuple[int, int]]:
        """Resize, crop and flip an image.

        Args:
            image: Mode `L`, `RGB`, `RGBA` or `F`, or an array `(H, W, C)` in 0..255.
            u: Horizontal place of the crop in [0, 1); `None` is the centre.
            v: Vertical place of the crop in [0, 1); `None` is the centre.
            flip: How the crop is mirrored afterwards; true: left to right.

        Returns:
            The image of `size`, and the crop's top and left in pixels of the resized image.
        """
        height, width = size_of(image)
        crop_height, crop_width = self.size
        scale = self.scale(height, width)
        resized = (
            max(round(width * scale), crop_width),
            max(round(height * scale), crop_height),
        )
        left = _place(resized[0] - crop_width, u)
        top = _place(resized[1] - crop_height, v)
        box = (left, top, left + crop_width, top + crop_height)
        if resized == (width, height):
            image = image if box == (0, 0, width, height) else _cut(image, box)
        else:
            # Resampling only the crop's source rectangle equals resizing the whole and cropping:
            # the filter still sees the pixels around the rectangle.
            image = _resample(image, self.size, _source_box(image, resized, box))
        mirror = flip if isinstance(flip, Mirror) else Mirror(horizontal=flip)
        return mirror.apply(image), (top, left)


def _source_box(picture: Picture, resized: tuple[int, int], box: Box) -> Box:
    """Where a box of the resized picture lies in the picture as it is stored."""
    left, top, right, bottom = (
        extent_of(picture)[1]
        if isinstance(picture, Image.Image)
        else (0, 0, picture.shape[1], picture.shape[0])
    )
    x, y = (right - left) / resized[0], (bottom - top) / resized[1]
    return left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y


def _cut(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.crop(box)
    left, top, right, bottom = box
    return picture[top:bottom, left:right]


def _resample(
    picture: Picture, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Picture:
    """Bicubic, antialiased; an array channel by channel, at its own precision."""
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2] == 3:
        # Channels stay apart in Pillow's RGB too, and it takes them in one pass.
        return np.asarray(_resample(Image.fromarray(np.ascontiguousarray(picture)), size, box))
    if isinstance(picture, np.ndarray):
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(picture, 2, 0)]
        return np.stack([np.asarray(_resample(band, size, box)) for band in bands], axis=2)
    picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    unmark(picture)
    if picture.mode == "F":  # bicubic overshoots; 8-bit modes clip by themselves
        picture = Image.fromarray(np.clip(np.asarray(picture), 0.0, 255.0))
    return picture


def _place(room: int, share: float | None) -> int:
    return room // 2 if share is None else min(int(share * (room + 1)), room)


def images_from_pixels(pixels: Tensor) -> Tensor:
    """Batches of pixels as the networks see them.

    Args:
        pixels: `(B, H, W, C)`, uint8 or float32 in 0..255, on any device.

    Returns:
        `(B, C, H, W)`, float32 in [-1, 1]; in memory the channels stay last.
    """
    return pixels.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def pixels_from_images(images: Tensor) -> Tensor:
    """Images as 8-bit pixels: clamped and *rounded*, not truncated.

    Args:
        images: `(B, C, H, W)`, float in [-1, 1]; values outside are clamped.

    Returns:
        `(B, H, W, C)`, uint8.
    """
    scaled = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5)
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
