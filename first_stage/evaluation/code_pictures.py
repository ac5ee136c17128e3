"""Pictures of a discrete first stage: its codes by use, and which code stands where in an image."""

import math

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from first_stage.data import displayed
from first_stage.evaluation.grids import grid
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, reconstruct

MOST_CODES = 256
"""How many codes are drawn; the most used ones of more."""
_REPEATS = 3
_CELL = 16
"""At least how large a code is shown, in pixels."""


@torch.no_grad()
def draw_codes(
    stage: FirstStage, shares: Tensor, display: tuple[int, ...] | None = None
) -> Image.Image:
    """What codes look like decoded, row by row from the most used one to the least.

    They are decoded in one image, because the decoder's norms compare every place with all others:
    a code alone would have other colors. Each fills three by three places, and the one in the
    middle is shown.

    Args:
        stage: A first stage with codes.
        shares: `(K,)`, how much each is used. Those that are not are left out, while any are.
        display: Which channels are shown; `None` as `displayed` says.

    Returns:
        The picture: at most `MOST_CODES` codes.
    """
    order = shares.argsort(descending=True, stable=True)
    used = int((shares > 0).sum()) or len(order)
    order = order[: min(used, MOST_CODES)]
    columns = math.ceil(math.sqrt(len(order)))
    filled = torch.cat([order, order[-1:].expand(-len(order) % columns)])
    places = filled.view(-1, columns).repeat_interleave(_REPEATS, 0).repeat_interleave(_REPEATS, 1)
    decoded = stage.decode_tokens(places[None].to(stage.device))
    cells = rearrange(decoded[0], "c (y h) (x w) -> y x c h w", y=len(filled) // columns, x=columns)
    f, first = stage.downsample_factor, stage.downsample_factor * (_REPEATS // 2)
    cells = cells[:, :, displayed(cells.shape[2], display), first : first + f, first : first + f]
    cells = rearrange(cells, "y x c h w -> (y x) c h w")[: len(order)]
    cells = F.interpolate(cells, scale_factor=max(_CELL // f, 1), mode="nearest")
    rows = list(cells.split(2 * columns))
    if len(rows) > 1 and len(rows[-1]) < 2 * columns:  # white where there is no code
        missing = 2 * columns - len(rows[-1])
        rows[-1] = torch.cat([rows[-1], torch.ones_like(rows[0][:missing])])
    return grid(rows)


@torch.no_grad()
def token_maps(stage: FirstStage, latents: Tensor) -> np.ndarray:
    """Which code stands where, each in a color of its own; codes that lie close look alike.

    Args:
        stage: A first stage with codes.
        latents: `(B, D, h, w)` as they are handed over.

    Returns:
        `(B, h, w, 3)` uint8.
    """
    assert isinstance(stage.bottleneck, Discrete)
    tokens = stage.bottleneck.tokens(latents).cpu()
    return code_colors(stage.bottleneck.table())[tokens.numpy()]


def draw_tokens(
    stage: FirstStage, images: Tensor, display: tuple[int, ...] | None = None
) -> Image.Image:
    """Images over their token maps, which are enlarged to the same size.

    Args:
        stage: A first stage with codes.
        images: `(B, C, H, W)` in [-1, 1].
        display: Which channels are shown; `None` as `displayed` says.
    """
    _, encoded = reconstruct(stage, images)
    maps = torch.from_numpy(token_maps(stage, encoded.latents)).movedim(3, 1).float() / 127.5 - 1
    maps = F.interpolate(maps, scale_factor=stage.downsample_factor, mode="nearest")
    maps = maps[..., : images.shape[-2], : images.shape[-1]]
    return grid([images[:, displayed(images.shape[1], display)], maps])


@torch.no_grad()
def code_colors(table: Tensor) -> np.ndarray:
    """A color for each code: its rank along the codebook's three main axes as red, green, blue.

    Args:
        table: The codebook, `(K, D)`.

    Returns:
        `(K, 3)` uint8; without a second or third axis green and blue are middle values.
    """
    vectors = table.detach().cpu().double()
    vectors = vectors - vectors.mean(0)
    _, axes = torch.linalg.eigh(vectors.mT @ vectors)
    axes = axes.flip(1)[:, :3]  # the longest first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    ranks = (vectors @ (axes * largest.sign())).argsort(dim=0, stable=True).argsort(dim=0)
    colors = np.full((len(vectors), 3), 127, dtype=np.uint8)
    spread = ranks.double() / max(len(vectors) - 1, 1)
    # Neither black nor white, so that a map stands out from the page.
    colors[:, : axes.shape[1]] = (25 + 205 * spread).round().to(torch.uint8).numpy()
    return colors
