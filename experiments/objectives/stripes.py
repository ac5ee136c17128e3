"""Stripes and the same stripes shifted by a pixel: the same to a person, and to which distance?

Stripes of one pixel, their shift by one pixel, and flat gray. A distance that works finds the two
kinds of stripes closer to each other than to gray: d(stripes, shifted) / d(stripes, gray) below 1.
Mean squared error says 4, whatever the stripes' contrast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from first_stage.losses.learned import feature_distances, feature_magnitudes
from first_stage.models.critic import Critic

_SIDE, _CONTRAST = 64, 0.5


def stripes(channels: int, side: int = _SIDE, contrast: float = _CONTRAST) -> tuple[Tensor, ...]:
    """Stripes, the stripes shifted by one pixel, and gray, each `(1, C, side, side)`.

    Args:
        channels: Channels.
        side: Side in pixels, even.
        contrast: They alternate between this and its negative, on the scale [-1, 1].
    """
    row = torch.tensor([contrast, -contrast]).repeat(side // 2)
    image = row.expand(1, channels, side, side).contiguous()
    return image, image.roll(1, dims=-1), torch.zeros_like(image)


def pixel_ratio(distance: str) -> float:
    """The ratio for `l1` or `l2` between pixels: 2 and 4."""
    image, shifted, gray = stripes(1)
    return _ratios([image], [shifted], [gray], distance)[0].item()


def feature_ratio(features: Sequence[Sequence[Tensor]]) -> float:
    """The ratio for the mean distance between feature vectors at the same place.

    Args:
        features: One feature map `(1, C, h, w)` of stripes, shifted stripes and gray each.
    """
    image, shifted, gray = (maps[0] for maps in features)
    lengths = [(image - other).square().sum(1).sqrt().mean() for other in (shifted, gray)]
    return float(lengths[0] / lengths[1])


@torch.no_grad()
def critic_ratios(critic: Critic, photos: Tensor, distance: str = "l1") -> dict[str, float]:
    """The ratios for the distance that a critic has learned.

    Args:
        critic: The critic.
        photos: `(B, C, H, W)` in [-1, 1]; the layers are divided by their magnitudes on these, as
            in training.
        distance: Between feature maps.

    Returns:
        `all` for the mean over its layers, and `layer 0` and so on for each alone.
    """
    magnitudes = feature_magnitudes(critic(photos).features, distance)
    channels, device = photos.shape[1], photos.device
    image, shifted, gray = (critic(x.to(device)).features for x in stripes(channels))
    near = feature_distances(shifted, image, distance) / magnitudes
    far = feature_distances(gray, image, distance) / magnitudes
    ratios = {f"layer {n}": float(a / b) for n, (a, b) in enumerate(zip(near, far, strict=True))}
    return {"all": float(near.mean() / far.mean())} | ratios


def _ratios(
    image: Sequence[Tensor], shifted: Sequence[Tensor], gray: Sequence[Tensor], distance: str
) -> Tensor:
    near = feature_distances(shifted, image, distance)
    return near / feature_distances(gray, image, distance)
