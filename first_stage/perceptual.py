"""Distances between feature maps: how different two images are to a network.

With a critic's feature maps this is the learned similarity of Larsen et al. 2016, "Autoencoding
beyond pixels using a learned similarity metric", equation 8: the critic has learned which features
matter in this data set, whatever its number of channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_distances(
    fakes: Sequence[Tensor], reals: Sequence[Tensor], distance: str = "l1"
) -> Tensor:
    """The distance of each layer.

    Args:
        fakes: Feature maps of the reconstructions, each `(B, C_l, h_l, w_l)`.
        reals: Feature maps of the images, of the same shapes. They are detached: the distance must
            not be lowered by moving the yardstick.
        distance: `l1` (mean absolute difference) or `l2` (mean squared difference).

    Returns:
        `(layers,)`: mean over batch, channels and places.
    """
    if distance == "l1":
        each = [(f - r.detach()).abs().mean() for f, r in zip(fakes, reals, strict=True)]
    else:
        each = [(f - r.detach()).square().mean() for f, r in zip(fakes, reals, strict=True)]
    return torch.stack(each)


def feature_magnitudes(reals: Sequence[Tensor], distance: str = "l1") -> Tensor:
    """The size of each layer's features, in the unit of `feature_distances`.

    Args:
        reals: Feature maps of the images, each `(B, C_l, h_l, w_l)`.
        distance: As in `feature_distances`.

    Returns:
        `(layers,)`, detached: mean absolute or mean squared value.
    """
    zeros = [r.new_zeros(()) for r in reals]
    return feature_distances([r.detach() for r in reals], zeros, distance)
