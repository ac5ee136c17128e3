"""From an image file to pixels and from pixels to what networks see: the only place that knows.

Stated rule for reading a file into `channels` channels:

1. EXIF orientation is applied.
2. 16-bit gray (modes `I;16`, `I`) keeps its precision: divided by 257 into 0..255 as float32. All
   other files are 8 bits per channel (16-bit colour PNGs are reduced to 8 bits by Pillow).
3. Palette, CMYK, YCbCr, LAB and HSV files become RGB, or RGBA where they carry transparency.
4. For 1 and 3 channels a transparent image is laid over white. For 4 channels alpha is kept; an
   opaque image gets alpha 255.
5. One channel is the luma of ITU-R 601; gray is repeated for three channels.

Between the file and the device pixels are `(H, W, C)` in 0..255 (uint8, or float32 for 16-bit
files); `images_from_pixels` turns batches of them into float32 in [-1, 1], `pixels_from_images`
turns images back with rounding.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from first_stage.errors import DataError, first_line

CHANNELS = (1, 3, 4)
"""The channel counts that image files can be read into."""

_TRANSPARENT = {"RGBA", "LA", "PA", "RGBa", "La"}
_SIXTEEN_BIT = {"I", "I;16", "I;16L", "I;16B", "I;16N"}


class BrokenImage(Exception):
    """A file that cannot be decoded; the message is the reason."""


def open_image(file: bytes | str | Path | Image.Image, channels: int) -> Image.Image:
    """Decode an image file by the rule at the top of this module.

    Args:
        file: The encoded bytes, a path, or an image that is already decoded.
        channels: 1, 3 or 4.

    Returns:
        A loaded image of mode `L`, `RGB` or `RGBA`, or `F` in 0..255 for 16-bit gray files, which
        `pixels_of` repeats to the channels asked for.

    Raises:
        BrokenImage: With the reason when the file cannot be decoded.
        DataError: When `channels` is not 1, 3 or 4.
    """
    if channels not in CHANNELS:
        raise DataError(
            f"model.in_channels is {channels}, but image files are read into 1, 3 or 4 channels"
        )
    try:
        with warnings.catch_warnings():
            # A large image is fine; Pillow raises on its own where it smells a decompression bomb.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(file, Image.Image):
                image = file
            else:
                image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
            image.load()
        image = ImageOps.exif_transpose(image)
        return _with_channels(image, channels)
    except UnidentifiedImageError:
        raise BrokenImage("not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenImage(first_line(error)) from None


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("float pixels (mode F) have no stated range; store 8 or 16 bit integers")
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.float32)
        # Mode I is 32 bit; what image files put into it is 16 bit gray.
        return Image.fromarray(np.clip(values, 0, 65535) / np.float32(257.0))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels < 4:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    elif image.mode not in {"L", "RGB", "1"}:
        image = image.convert("RGB")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels of an image from `open_image`.

    Args:
        image: Mode `L`, `RGB`, `RGBA` or `F` (one value per pixel in 0..255).
        channels: 1, 3 or 4.

    Returns:
        `(H, W, C)`, uint8 in 0..255, or float32 in 0..255 for mode `F`.
    """
    array = np.array(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] != channels:
        array = np.repeat(array, min(channels, 3), axis=2)
        if channels == 4:
            array = np.concatenate([array, np.full_like(array[..., :1], 255)], axis=2)
    return array


@dataclass(frozen=True)
class View:
    """Which part of an image is seen: resize of the shorter side, then a crop, then a flip.

    Attributes:
        resolution: Side of the square crop, in pixels.
        resize: Shorter side after resizing (bicubic, antialiased), in pixels; `None` leaves images
            as they are. An image smaller than the crop is always enlarged until the crop fits.
        shape: (height, width) of the crop instead of a square: the image is resized until it just
            covers the crop, and `resize` does not matter.
    """

    resolution: int
    resize: int | None
    shape: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crop."""
        return self.shape or (self.resolution, self.resolution)

    def apply(
        self, image: Image.Image, u: float | None = None, v: float | None = None, flip: bool = False
    ) -> tuple[Image.Image, tuple[int, int]]:
        """Resize, crop and flip an image.

        Args:
            image: Mode `L`, `RGB`, `RGBA` or `F`.
            u: Horizontal place of the crop in [0, 1); `None` is the centre.
            v: Vertical place of the crop in [0, 1); `None` is the centre.
            flip: Mirror left to right after the crop.

        Returns:
            The image of `size`, and the crop's top and left in pixels of the resized image.
        """
        width, height = image.size
        crop_height, crop_width = self.size
        scale = max(crop_height / height, crop_width / width)
        if self.shape is None:
            scale = max(scale, (self.resize or min(width, height)) / min(width, height))
        resized = (
            max(round(width * scale), crop_width),
            max(round(height * scale), crop_height),
        )
        left = _place(resized[0] - crop_width, u)
        top = _place(resized[1] - crop_height, v)
        box = (left, top, left + crop_width, top + crop_height)
        if resized == image.size:
            image = image.crop(box)
        else:
            # Resampling only the crop's source rectangle equals resizing the whole and cropping:
            # the filter still sees the pixels around the rectangle.
            x, y = width / resized[0], height / resized[1]
            image = image.resize(
                (crop_width, crop_height),
                Image.Resampling.BICUBIC,
                box=(box[0] * x, box[1] * y, box[2] * x, box[3] * y),
            )
            if image.mode == "F":  # bicubic overshoots; 8-bit modes clip by themselves
                image = Image.fromarray(np.clip(np.asarray(image), 0.0, 255.0))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, (top, left)


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
