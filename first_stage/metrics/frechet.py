"""Frechet distance between two sets of features, from streamed float64 statistics."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from first_stage.metrics.precision import in_float64


class GaussianStatistics:
    """Mean and covariance of feature vectors, batch by batch.

    Batches are merged by their means and scatter matrices (Chan et al. 1979, equation 1.5), which
    stays exact where sums of squares would cancel.

    Attributes:
        count: Vectors so far.
        mean: `(D,)` float64.
        scatter: `(D, D)` float64, the sum of `(x - mean)(x - mean)^T`.
    """

    def __init__(self, dimensions: int):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Count feature vectors `(B, D)`."""
        features = in_float64(features)
        if self.mean.device != features.device:
            self.mean, self.scatter = self.mean.to(features), self.scatter.to(features)
        part = GaussianStatistics(0)
        part.count, part.mean = len(features), features.mean(0)
        centred = features - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: "GaussianStatistics") -> None:
        """Add the vectors of another one, which lies on the same device."""
        total = self.count + other.count
        if other.count == 0:
            return
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total

    def merged(self, total: Callable[[Tensor], Tensor]) -> "GaussianStatistics":
        """The statistics of several processes as one.

        Args:
            total: Adds a tensor up over processes.

        Returns:
            The statistics of all vectors, equal on every process.
        """
        result = GaussianStatistics(len(self.mean))
        count = total(torch.tensor([float(self.count)], dtype=torch.float64))
        result.count = round(float(count))
        result.mean = total(self.mean * self.count) / max(result.count, 1)
        shift = self.mean - result.mean.to(self.mean)
        result.scatter = total(self.scatter + torch.outer(shift, shift) * self.count)
        return result

    @property
    def covariance(self) -> Tensor:
        """`(D, D)`, unbiased.

        Raises:
            ValueError: With fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two vectors, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class FrechetDistance:
    """A Frechet distance and what was done for it.

    Attributes:
        value: The (squared) distance, at least 0.
        dimensions: Length of the feature vectors.
        ranks: Ranks of the two covariances.
        note: What was done about a singular covariance; empty when both are regular.
    """

    value: float
    dimensions: int
    ranks: tuple[int, int]
    note: str


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> FrechetDistance:
    """Frechet distance between two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    `|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`. The trace of the root is the sum of the
    singular values of `R_a^T R_b` with `A = R_a R_a^T`, where the factors keep the directions in
    which a covariance has variance. That is exact for singular covariances too: nothing is added
    to their diagonals, and no imaginary part has to be thrown away.

    Args:
        a: Statistics of one set.
        b: Statistics of the other, of the same length.

    Returns:
        The distance.

    Raises:
        ValueError: With fewer than two vectors in a set, or vectors of different lengths.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers")
    covariances = [s.covariance.cpu().numpy() for s in (a, b)]
    roots = [_root(covariance) for covariance in covariances]
    shift = (a.mean.cpu() - b.mean.cpu()).numpy()
    overlap = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    value = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * overlap
    dimensions = len(a.mean)
    ranks = (roots[0].shape[1], roots[1].shape[1])
    note = ""
    if min(ranks) < dimensions:
        note = (
            f"singular covariance: rank {ranks[0]} and {ranks[1]} in {dimensions} dimensions "
            f"({a.count} images); the root was taken in the directions that have variance, without "
            "regularisation. The value is biased: compare it only with the same number of images"
        )
    return FrechetDistance(max(float(value), 0.0), dimensions, ranks, note)


def _root(covariance: np.ndarray) -> np.ndarray:
    """`R` of shape `(D, rank)` with `R R^T` the covariance; rounding noise is left out."""
    values, vectors = np.linalg.eigh(covariance)
    noise = max(values[-1], 0.0) * len(values) * np.finfo(values.dtype).eps
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])
