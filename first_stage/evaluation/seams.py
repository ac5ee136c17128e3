"""Tiled decoding, as diffusers does it for large images, against decoding whole.

Tiles are normalized apart and see nothing beyond their border, so they come out unlike where they
meet. diffusers blends them over a strip; what is left is measured here, in these strips and
elsewhere.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from first_stage.data import displayed
from first_stage.errors import first_line
from first_stage.evaluation.grids import grid
from first_stage.evaluation.images import ImageList, group_by_shape
from first_stage.metrics.precision import full_float32, in_float64
from first_stage.models.first_stage import FirstStage

AMPLIFIED = 16
"""By how much a picture enlarges differences."""


@dataclass(frozen=True)
class Tiles:
    """How diffusers cuts an image, in pixels.

    Attributes:
        size: Side of a tile.
        stride: From one tile to the next.
    """

    size: int
    stride: int

    @property
    def image_side(self) -> int:
        """Side of an image that takes two tiles in a row."""
        return self.size + self.stride // 2

    def near(self, side: int, margin: int) -> Tensor:
        """`(side,)` bool: which rows, or columns, lie in a strip where two tiles are blended.

        Args:
            side: Of the image.
            margin: How far around a strip, in pixels.
        """
        result = torch.zeros(side, dtype=torch.bool)
        for start in range(self.stride, side, self.stride):
            result[max(start - margin, 0) : start + self.size - self.stride + margin] = True
        return result


def tiles_of(model: Any) -> Tiles | None:
    """How a diffusers model cuts images in its own settings; `None` where it cannot."""
    if not hasattr(model, "use_tiling"):
        return None
    height, step = (
        getattr(model, f"tile_sample_{name}_height", None) for name in ("min", "stride")
    )
    if height and step:
        return Tiles(int(height), int(step))
    size, overlap = (
        getattr(model, name, None) for name in ("tile_sample_min_size", "tile_overlap_factor")
    )
    if isinstance(size, list | tuple):
        size = size[0]
    if size and overlap:
        return Tiles(int(size), int(size) - int(size * overlap))
    return None


@contextlib.contextmanager
def tiled(model: Any) -> Iterator[None]:
    """Let a diffusers model decode in tiles, for the time being."""
    before = model.use_tiling
    model.enable_tiling()
    try:
        yield
    finally:
        model.use_tiling = before


@torch.no_grad()
@full_float32()
def seam_test(
    stage: FirstStage, images: ImageList, count: int
) -> tuple[dict[str, Any], Image.Image | None]:
    """Decode images whole and in tiles, and measure the difference.

    Args:
        stage: In eval mode.
        images: Some of these are taken, evenly spread over the list. Smaller ones are continued by
            their mirror image to one and a half tiles, larger ones cut to that.
        count: How many.

    Returns:
        Figures, and a picture of the first difference, `AMPLIFIED` times around gray: `note` says
        why there are no figures, else `tile`, `stride` and `side` in pixels, `images`, `psnr` of
        tiled against whole in dB (`None`: no difference), and the root mean square difference in
        8-bit levels `near` seams (in the strips where tiles are blended) and `elsewhere`.
    """
    tiles = tiles_of(stage.model)
    if tiles is None:
        name = type(stage.model).__name__
        return {"note": f"diffusers has no tiled decoding for {name}"}, None
    f = stage.downsample_factor
    side = -(-tiles.image_side // f) * f
    rows = tiles.near(side, f)
    mask = rows[:, None] | rows[None, :]
    squares: list[Tensor] = []
    picture: Image.Image | None = None
    for image in _pictures(images, count, side):
        latents = stage.encode(image.to(stage.device, stage.dtype)).latents
        whole = stage.decode(latents).clamp(-1, 1).cpu()
        try:
            with tiled(stage.model):
                parts = stage.decode(latents).clamp(-1, 1).cpu()
            difference = parts - whole
        except RuntimeError as error:  # AutoencoderTiny takes every first stage for f8
            reason = f"diffusers' tiled decoding fails for it: {first_line(error)}"
            return {"note": reason}, None
        squares.append(in_float64(difference).square().mean((0, 1)))
        if picture is None:
            shown = displayed(stage.in_channels, images.reading.display)[:3]
            picture = grid([(difference[:, shown] * AMPLIFIED).clamp(-1, 1)])
    if not squares:
        return {"note": "no image could be decoded"}, None
    mean = torch.stack(squares).mean(0)
    whole_error = float(mean.mean())
    return {
        "note": "",
        "tile": tiles.size,
        "stride": tiles.stride,
        "side": side,
        "images": len(squares),
        "psnr": -10 * float(np.log10(whole_error / 4)) if whole_error > 0 else None,
        "near": float(mean[mask].mean().sqrt() * 127.5),
        "elsewhere": float(mean[~mask].mean().sqrt() * 127.5),
    }, picture


def seams_in_words(seams: dict[str, Any]) -> str:
    """What the figures say, in a sentence."""
    if seams["note"]:
        return str(seams["note"])
    if seams["psnr"] is None:
        return f"decoding in tiles of {seams['tile']} pixels changes nothing"
    ratio = seams["near"] / seams["elsewhere"] if seams["elsewhere"] > 0 else float("inf")
    return (
        f"in tiles of {seams['tile']} pixels images differ from those decoded whole by "
        f"{seams['near']:.2g} of 255 levels near the seams and {seams['elsewhere']:.2g} elsewhere "
        f"({ratio:.1f} times), {seams['psnr']:.1f} dB in all"
    )


def _pictures(images: ImageList, count: int, side: int) -> Iterator[Tensor]:
    """Images `(1, C, side, side)` in [-1, 1]: some of the list, evenly spread."""
    places = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    for place in places.tolist():
        item = images[place]
        if item.pixels is not None:
            image = group_by_shape([item])[0].images
            height, width = image.shape[-2:]
            yield image[..., _mirrored(height, side), :][..., _mirrored(width, side)]


def _mirrored(length: int, side: int) -> Tensor:
    """So many places along an axis: its middle, or there and back again until there are enough.

    The pixel at the end comes twice, so that an axis of one can be continued, too.
    """
    if length >= side:
        first = (length - side) // 2
        return torch.arange(first, first + side)
    once = torch.cat([torch.arange(length), torch.arange(length - 1, -1, -1)])
    return once.repeat(-(-side // len(once)))[:side]
