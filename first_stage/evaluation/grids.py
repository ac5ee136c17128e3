"""Pictures of a run: a grid of originals over reconstructions, and a GIF of it over training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from first_stage.data.images import pixels_from_images
from first_stage.files import write_atomic

_GAP = 4
_GIF_CELL = 128
_GIF_FRAMES = 60
_COLOURS = 256
_PAPER, _INK = (255, 255, 255), (60, 60, 60)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """A picture of 8-bit pixels `(H, W, C)`; more than four channels show the first three."""
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0]).convert("RGB")
    if pixels.shape[2] == 2:
        return Image.fromarray(pixels[:, :, 0]).convert("RGB")
    if pixels.shape[2] == 4:
        rgba = Image.fromarray(pixels)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def grid(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of images on white, one below the other.

    Args:
        rows: Each `(N, C, H, W)` in [-1, 1], all of one shape.

    Returns:
        The picture, RGB.
    """
    height, width = rows[0].shape[2:]
    columns = rows[0].shape[0]
    size = (
        columns * (width + _GAP) + _GAP,
        len(rows) * (height + _GAP) + _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(pixels_from_images(row).cpu().numpy()):
            place = (_GAP + x * (width + _GAP), _GAP + y * (height + _GAP))
            sheet.paste(to_picture(pixels), place)
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    write_atomic(path, lambda p: picture.save(p, format="PNG"))


def save_gif(frames: Sequence[tuple[str, Path]], cell: int, path: Path) -> None:
    """Animate grids that were saved as PNG, each under its caption.

    Args:
        frames: Caption and file of each; more than 60 are thinned out evenly.
        cell: Side of one image in the grids, in pixels; frames are shrunk so that it is at most
            128.
        path: The GIF.
    """
    if len(frames) > _GIF_FRAMES:
        keep = np.linspace(0, len(frames) - 1, _GIF_FRAMES).round().astype(int)  # both ends too
        frames = [frames[i] for i in keep]
    shrink = min(1.0, _GIF_CELL / cell)
    pictures = []
    for caption, file in frames:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        size = (round(picture.width * shrink), round(picture.height * shrink))
        picture = picture.resize(size, Image.Resampling.BICUBIC) if shrink < 1 else picture
        sheet = Image.new("RGB", (picture.width, picture.height + 16), _PAPER)
        sheet.paste(picture, (0, 16))
        ImageDraw.Draw(sheet).text((_GAP, 2), caption, fill=_INK)
        pictures.append(sheet)
    if not pictures:
        return
    # One palette, of the sharpest frame, and no dithering: a palette for each frame and noise that
    # changes from frame to frame take nine tenths of the time, and most of the file.
    palette = pictures[-1].quantize(_COLOURS)
    pictures = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    # The last frame stays longer, so that the loop has an end to look at.
    durations = [150] * (len(pictures) - 1) + [1500]

    def write(target: Path) -> None:
        pictures[0].save(
            target, format="GIF", save_all=True, append_images=pictures[1:],
            duration=durations, loop=0,
        )  # fmt: skip

    write_atomic(path, write)
