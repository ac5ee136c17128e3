"""Flat colors through a first stage: what is not flat afterwards, the decoder made up.

A constant image has all of its energy in its mean. What a reconstruction has beside it is a pattern
of the decoder's own: a checkerboard repeats with every latent, a spot or a border does not. This
shows before any data do, and independent of them.
"""

import math
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from first_stage.data import displayed
from first_stage.evaluation.grids import grid
from first_stage.metrics.precision import full_float32, in_float64
from first_stage.models.first_stage import FirstStage, reconstruct

LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Of all channels alike."""
_ALONE = 6
"""Channels that are shown bright while the others are dark, at most."""
_LATENTS = 16
"""Latents along a side of the test images ..."""
_LEAST_SIDE = 64
"""... and their side in pixels at least."""
AMPLIFIED = 16
"""By how much a picture enlarges what is not flat."""


def flat_colors(channels: int) -> Tensor:
    """Colors to test, `(N, C)` in [-1, 1]: five levels of gray, then each channel alone.

    A fourth channel is taken for alpha: it is opaque, and transparent in one color more.
    """
    colors = 3 if channels == 4 else channels
    rows = [[level] * colors for level in LEVELS]
    if colors > 1:
        rows += [[1.0 if c == k else -1.0 for c in range(colors)] for k in range(colors)][:_ALONE]
    if channels == 4:
        rows = [[*row, 1.0] for row in rows] + [[-1.0, -1.0, -1.0, -1.0]]
    return torch.tensor(rows)


@torch.no_grad()
@full_float32()
def flat_test(
    stage: FirstStage, display: tuple[int, ...] | None = None
) -> tuple[dict[str, Any], Image.Image]:
    """Reconstruct constant images and measure what is not constant.

    Args:
        stage: In eval mode.
        display: Which channels the picture shows; `None` as `displayed` says.

    Returns:
        Figures, and a picture: above the reconstructions, below their differences from their own
        means, `AMPLIFIED` times, around gray. The figures, over all colors, of values clamped to
        [-1, 1] and not rounded: `off_mean`, the share of their energy that is off the mean;
        `ripple`, the root mean square of it in 8-bit levels, and `ripple_inside` without the outer
        quarter on each side; `repeats`, the share of that inside which is the same at every latent
        (`None` where there is nothing); `shift`, the root mean square error of the means in levels;
        and `side` in pixels. `colors` has `color`, `ripple` and `shift` of each.
    """
    f = stage.downsample_factor
    side = max(_LATENTS, math.ceil(_LEAST_SIDE / f)) * f
    colors = flat_colors(stage.in_channels)
    images = colors[:, :, None, None].expand(-1, -1, side, side)
    # One by one: they are of one shape, but a large network may not have room for all.
    decoded = torch.cat([reconstruct(stage, x.contiguous())[0].cpu() for x in images.split(1)])
    decoded = decoded.clamp(-1, 1)
    values = in_float64(decoded)
    off = values - values.mean((2, 3), keepdim=True)
    margin = side // f // 4 * f
    inside = values[..., margin : side - margin, margin : side - margin]
    inside = inside - inside.mean((2, 3), keepdim=True)
    cells = rearrange(inside, "n c (y h) (x w) -> n c y x h w", h=f, w=f)
    repeated, all_inside = cells.mean((2, 3)).square().mean(), inside.square().mean()
    errors = (values.mean((2, 3)) - colors).square().mean(1)
    figures = {
        "side": side,
        "off_mean": float(off.square().sum() / values.square().sum().clamp_min(1e-30)),
        "ripple": _levels(off.square().mean()),
        "ripple_inside": _levels(all_inside),
        "repeats": float(repeated / all_inside) if all_inside > 0 else None,
        "shift": _levels(errors.mean()),
        "colors": [
            {"color": color, "ripple": _levels(ripple), "shift": _levels(error)}
            for color, ripple, error in zip(
                colors.tolist(), off.square().mean((1, 2, 3)), errors, strict=True
            )
        ],
    }
    shown = displayed(stage.in_channels, display)[:3]
    enlarged = (off[:, shown] * AMPLIFIED).clamp(-1, 1).float()
    return figures, grid([decoded[:, shown], enlarged])


def flat_in_words(flat: dict[str, Any]) -> str:
    """What the figures say, in a sentence."""
    text = (
        f"{share_text(flat['off_mean'])} of the energy of reconstructed flat colors is off their "
        f"mean: {flat['ripple']:.2g} of 255 levels (root mean square), away from the borders "
        f"{flat['ripple_inside']:.2g}"
    )
    if flat["repeats"] is not None and flat["ripple_inside"] >= 0.05:
        text += (
            f", of which {flat['repeats']:.0%} repeats with every latent (a checkerboard; the rest "
            "are spots and slopes)"
        )
    return text


def share_text(share: float) -> str:
    """A share as a percentage with two digits that count."""
    return "0%" if share == 0 else f"{100 * share:.2g}%"


def _levels(square: Tensor) -> float:
    """Root of a mean square on the [-1, 1] scale, in 8-bit levels."""
    return float(square.sqrt() * 127.5)
