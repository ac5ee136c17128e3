"""Nearest codes, and how a gradient passes them: the mathematics of discrete bottlenecks.

Plain functions on tensors. Vectors are rows: N tokens `(N, D)`, a codebook of K codes `(K, D)`.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from first_stage.metrics.precision import full_float32

_DISTANCES_AT_ONCE = {"cpu": 2**20, "other": 2**26}
"""On a CPU as many as its cache holds, which halves the search among 16,384 codes; on others enough
to keep them busy."""
_TINY = 1e-6


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor, at_once: int | None = None) -> Tensor:
    """Index of the nearest code by Euclidean distance, `(N,)` int64; the first of equal ones.

    The same operations as in diffusers' `VectorQuantizer`, so that the same codes come out, but
    some tokens at a time: no N x K tensor is kept.

    Args:
        vectors: `(N, D)` float32.
        codes: `(K, D)` float32.
        at_once: Tokens whose distances are held together; it does not change what is found. `None`:
            as many as suit the device.
    """
    if at_once is None:
        held = _DISTANCES_AT_ONCE["cpu" if vectors.device.type == "cpu" else "other"]
        at_once = max(held // len(codes), 16)
    with full_float32():
        found = [torch.cdist(part, codes).argmin(1) for part in vectors.split(at_once)]
    return torch.cat(found) if found else vectors.new_zeros(0, dtype=torch.int64)


def straight_through(vectors: Tensor, quantized: Tensor) -> Tensor:
    """The quantized vectors, whose gradient goes to `vectors` unchanged (Bengio et al. 2013)."""
    return vectors + (quantized - vectors).detach()


def rotate(vectors: Tensor, quantized: Tensor) -> Tensor:
    """The quantized vectors as a rotation and scaling of `vectors`, both taken as constants.

    Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", section 4.2: the
    gradient that reaches a vector is turned as the vector was, instead of copied.

    Args:
        vectors: `(N, D)`, with the encoder's graph.
        quantized: `(N, D)`.
    """
    sizes = vectors.norm(dim=1, keepdim=True).clamp_min(_TINY).detach()
    target = quantized.norm(dim=1, keepdim=True).clamp_min(_TINY).detach()
    start, end = (vectors / sizes).detach(), (quantized / target).detach()
    middle = start + end
    middle = (middle / middle.norm(dim=1, keepdim=True).clamp_min(_TINY)).detach()
    turned = (
        vectors
        - 2 * (vectors * middle).sum(1, keepdim=True) * middle
        + 2 * (vectors * start).sum(1, keepdim=True) * end
    )
    return turned * (target / sizes)


def grid(levels: Sequence[int]) -> Tensor:
    """Every point of a finite grid in [-1, 1], `(prod(levels), len(levels))` float32.

    Mentzer et al. 2023, "Finite scalar quantization", with the same number of values on each axis
    as levels, evenly spaced from -1 to 1. The last axis changes fastest.
    """
    axes = [torch.linspace(-1, 1, count) for count in levels]
    return torch.cartesian_prod(*axes).reshape(math.prod(levels), len(levels))


def round_to_grid(vectors: Tensor, levels: Sequence[int]) -> Tensor:
    """The nearest point of the grid by axis, `(N, len(levels))`; from outside, on the edge.

    Args:
        vectors: `(N, len(levels))`.
        levels: Values on each axis.
    """
    steps = _steps(tuple(levels), vectors.dtype, vectors.device)
    return (((vectors.clamp(-1, 1) + 1) / 2 * steps).round() / steps) * 2 - 1


@functools.lru_cache(maxsize=16)
def _steps(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Steps from one end of each axis to the other; sent to a device once, not in every step."""
    return torch.tensor([count - 1 for count in levels], dtype=dtype, device=device)


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy of a distribution over codes `(K,)`: how many are used, in effect."""
    return torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())
