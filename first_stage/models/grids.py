"""Finite grids: discrete bottlenecks with nothing to learn (FSQ)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from first_stage.config.types import PositiveInt
from first_stage.distributed.processes import Processes
from first_stage.models.bottlenecks import Code
from first_stage.models.discrete import Discrete, per_sample, to_places, to_rows
from first_stage.models.quantizers import grid, round_to_grid, straight_through

_RECENT_DECAY = 0.9
"""Of the shares that a grid's entropy is taken from. Vectors move away from where the crowd was:
with 0.99 they run after each other, and few codes are used at a time."""
_RARE = 0.1
"""Added to each share of a grid's codes, in units of 1/K, so that those never used have a log."""


@dataclass(frozen=True)
class GridConfig:
    """A finite grid instead of a codebook (FSQ, Mentzer et al. 2023)."""

    levels: tuple[PositiveInt, ...] = (8, 5, 5, 5)
    """Values on each axis; their product is the number of codes, their count the latent channels.
    8,5,5,5 has 1,000 codes, 7,5,5,5,5 has 4,375, 8,8,8,6,5 has 15,360."""


class FiniteGrid(Discrete):
    """A grid of fixed points (FSQ): nothing to learn, nothing to restart.

    Vectors are clamped to [-1, 1] and rounded, axis by axis; the gradient passes both as if they
    were not there. Two penalties keep vectors where the grid is and spread them over it:

    - `range` is the mean square of what lies beyond the bounds.
    - `entropy` is how far the codes are from being equally frequent: 1 - H / log K, H the entropy
      of their frequencies; 0 where they are, 1 where there is one code. Without it all axes first
      learn the same, brightness, and vectors lie along a curve through the grid. The frequencies
      are those of earlier steps, so that it is a sum over vectors, however a batch is split.

    Args:
        levels: Values on each axis.

    Attributes:
        recent: `(K,)` share of each code, averaged over fewer steps than `usage`.
    """

    weights: ClassVar[Mapping[str, float]] = {"range": 1.0, "entropy": 0.1}
    points: Tensor
    recent: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__(math.prod(levels))
        self.levels = tuple(levels)
        self.register_buffer("recent", torch.zeros(math.prod(levels)))
        self.register_buffer("points", grid(levels), persistent=False)

    def table(self) -> Tensor:
        """The grid's points, `(K, D)`."""
        return self.points

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The grid's points nearest to the encoder's vectors `(B, D, h, w)`."""
        vectors = to_rows(output)
        rounded = round_to_grid(vectors.detach(), self.levels)
        if torch.is_grad_enabled():
            self._note(self._numbers(rounded))
        beyond = (vectors.abs() - 1).clamp_min(0).square()
        penalties = {
            "range": per_sample(beyond, len(output)),
            "entropy": per_sample(self._crowding(vectors), len(output)),
        }
        return Code(to_places(straight_through(vectors, rounded), output), penalties, self._facts())

    def _crowding(self, vectors: Tensor) -> Tensor:
        """The penalty `entropy` of each of the vectors, `(N,)`.

        1 + log p / log K, where log p is interpolated between the 2^D points around a vector.
        -H = sum_k p_k log p_k changes by log p_k + 1 with each share p_k, so its gradient is that
        of H where a vector counts for the points around it by how near it is. Out of bounds there
        is nowhere to go.
        """
        frequency = (self.recent + _RARE / len(self.recent)).log() / math.log(len(self.recent))
        lowest = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
        corners, shares = lowest[:1], []
        for axis, count in enumerate(self.levels):
            place = (vectors[:, axis].clamp(-1, 1) + 1) / 2 * (count - 1)
            below = place.detach().long().clamp_max(count - 2)
            shares.append(place - below)
            lowest = lowest * count + below[:, None]
            corners = torch.cat([corners * count, corners * count + 1])
        values = frequency[lowest + corners.mT].to(vectors.dtype)
        for share in reversed(shares):  # the axis put in last is what the two halves differ in
            low, high = values.chunk(2, dim=1)
            values = low + share[:, None] * (high - low)
        return 1 + values[:, 0]

    def _adapt(
        self, step: int, counts: Tensor, seen: Sequence[Tensor], processes: Processes, seed: int
    ) -> Mapping[str, Tensor]:
        """Take in how frequent codes are by now."""
        shares = counts / counts.sum().clamp_min(1)
        self.recent.lerp_(shares, 1.0 if step == 0 else 1 - _RECENT_DECAY)
        return {}

    def _numbers(self, points: Tensor) -> Tensor:
        """Numbers of points of the grid, by axis: no search."""
        numbers = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for axis, count in enumerate(self.levels):
            place = ((points[:, axis] + 1) / 2 * (count - 1)).round().long()
            numbers = numbers * count + place
        return numbers
