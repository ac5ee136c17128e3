"""The images that a report shows: originals, reconstructions and latents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from first_stage.data import displayed, pixels_from_images
from first_stage.evaluation.change import WORST
from first_stage.evaluation.code_pictures import token_maps
from first_stage.evaluation.images import ImageList, group_by_shape
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, reconstruct

MAX_SIDE = 512
"""Pictures larger than this show their centre, at full resolution."""
MAX_CHANNELS = 32
"""Latent channels shown as pictures at most."""
_LATENTS_OF = 4
"""How many of the shown images also show their latents."""


@dataclass
class Pair:
    """One image beside its reconstructions.

    Attributes:
        index: Its place in the list of images.
        id: Its id.
        original: `(H, W, C)` uint8.
        reconstructions: One per first stage, of the same shape.
        latents: Per first stage the channels `(C, h, w)` float32, or `None`.
        tokens: Per first stage its token map in colors `(h, w, 3)` uint8, or `None`.
        cropped: Whether only the centre is shown.
    """

    index: int
    id: str
    original: np.ndarray
    cropped: bool
    reconstructions: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray | None] = field(default_factory=list)
    tokens: list[np.ndarray | None] = field(default_factory=list)


def choose_pairs(per_image: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Which images to show: a third the worst by PSNR, the others evenly over the ranking.

    Args:
        per_image: Rows with `index`, `psnr` and `identical`.
        count: How many.

    Returns:
        Places in the list of images, in its order; the best image is among them.
    """
    ranked = sorted(per_image, key=lambda row: (row["identical"], row["psnr"] or 0.0))
    places = [int(row["index"]) for row in ranked]
    return _choose(places, count, max(count // 3, 1) if count else 0)


def choose_by_gain(ranked: Sequence[int], count: int) -> list[int]:
    """Which images to show of a before and after: the `WORST` first, the others evenly.

    Args:
        ranked: Places in the list of images, from the least gain to the greatest.
        count: How many.

    Returns:
        Places in the list's order; the one that gained most is among them where there is room.
    """
    return _choose(ranked, count, min(WORST, count))


def _choose(places: Sequence[int], count: int, worst: int) -> list[int]:
    """The first `worst` of ranked places, and others evenly from the rest, in the list's order."""
    if count >= len(places):
        return sorted(places)
    rest = places[worst:]
    others = count - worst
    step = [round(k * (len(rest) - 1) / max(others - 1, 1)) for k in range(others)]
    if others == 1:
        step = [len(rest) - 1]
    return sorted([*places[:worst], *(rest[k] for k in step)])


def start_pairs(images: ImageList, chosen: Sequence[int]) -> list[Pair]:
    """The chosen images, without reconstructions yet."""
    pairs = []
    for index in chosen:
        item = images[index]
        if item.pixels is None:
            continue
        whole = pixels_from_images(group_by_shape([item])[0].images)[0].numpy()
        whole = whole[..., displayed(whole.shape[-1], images.reading.display)]
        shown = _centre(whole)
        pairs.append(Pair(index, item.id, shown, cropped=shown.shape != whole.shape))
    return pairs


def add_reconstructions(pairs: Sequence[Pair], images: ImageList, first_stage: FirstStage) -> None:
    """Reconstruct each pair's image with one more first stage."""
    shown = {round(k * (len(pairs) - 1) / max(_LATENTS_OF - 1, 1)) for k in range(_LATENTS_OF)}
    for number, pair in enumerate(pairs):
        group = group_by_shape([images[pair.index]])[0]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            decoded, encoded = reconstruct(first_stage, group.images.to(first_stage.device))
        pixels = pixels_from_images(decoded)[0].cpu().numpy()
        pixels = pixels[..., displayed(pixels.shape[-1], images.reading.display)]
        pair.reconstructions.append(_centre(pixels))
        latents = encoded.latents[0, :MAX_CHANNELS].cpu().numpy()
        pair.latents.append(latents if number in shown else None)
        has_map = number in shown and isinstance(first_stage.bottleneck, Discrete)
        pair.tokens.append(token_maps(first_stage, encoded.latents)[0] if has_map else None)


def _centre(pixels: np.ndarray) -> np.ndarray:
    top, left = ((side - min(side, MAX_SIDE)) // 2 for side in pixels.shape[:2])
    return pixels[top : top + MAX_SIDE, left : left + MAX_SIDE]
