"""How far apart the vectors of a sample lie, as a price on those that crowd."""

import math

import torch
from einops import rearrange
from torch import Tensor

from first_stage.metrics.precision import full_float32

_CLOSE = 0.03
"""In units of the vectors' size: closer than about so, being close costs hardly more."""
_SMALLEST = 1e-12
"""What a mean square is at least."""
_AT_ONCE = 2**22
"""Distances that are looked at together."""


def crowding(latents: Tensor) -> Tensor:
    """How close the vectors of a sample lie to their neighbors: the negative of their entropy.

    log s - mean_i log |v_i - v_n(i)|, where n(i) is the nearest other vector of the same sample and
    s^2 the mean square of the vectors' distances from their mean. But for constants that is the
    negative estimate of the differential entropy of Kozachenko & Leonenko 1987, as Sablayrolles et
    al. 2019 spread vectors with it, of vectors scaled to size 1; in nats per dimension times D. At
    one size a round Gaussian has the most entropy. Being a sample's own, it does not depend on how
    a batch is split.

    Args:
        latents: `(B, D, h, w)`; with one place there is no neighbor, and nothing to pay.

    Returns:
        `(B,)` float32 (float64 of float64).
    """
    if latents.shape[2] * latents.shape[3] == 1:
        return latents.flatten(1).sum(1) * 0
    with torch.autocast(latents.device.type, enabled=False), full_float32():
        vectors = rearrange(latents, "b d h w -> b (h w) d")
        away = vectors - vectors.mean(1, keepdim=True)
        size = away.square().sum(2).mean(1).clamp_min(_SMALLEST)
        nearest = _nearest(away.detach())
        others = away.gather(1, nearest[..., None].expand_as(away))
        squares = (away - others).square().sum(2) + _CLOSE**2 * size[:, None]
        return (size.log() - squares.log().mean(1)) / 2


@torch.no_grad()
def _nearest(vectors: Tensor) -> Tensor:
    """Which other one of its sample is nearest to each of the vectors `(B, N, D)`: `(B, N)`."""
    found = []
    for part in vectors.split(max(1, _AT_ONCE // vectors.shape[1] ** 2)):
        # Pair by pair: products of matrices would round by how many samples there are.
        apart = torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist")
        apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
        found.append(apart.argmin(2))
    return torch.cat(found)
