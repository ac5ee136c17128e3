"""Statistics of latents per channel: exact, mergeable, in float64.

Each unit's commit holds the sums over its samples as they are *stored*, flips left out; merging
them in the order of the units gives the same numbers for any number of processes and any resumes.

The latents a diffusion model sees are draws z = mean + std * noise, so over a data set
Var(z) = Var(mean) + E[std^2]: the spread of the means plus the average posterior variance.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelSums:
    """What is merged: count, mean and squared deviations per channel.

    Chan, Golub & LeVeque 1979: merging (n, mean, sum of squared deviations) cancels nothing, unlike
    sums of squares.

    Attributes:
        images: Number of samples.
        count: Number of latent positions per channel: samples times h times w.
        mean: `(C,)` float64, mean of the posteriors' means (of the latents where there is no
            posterior).
        squares: `(C,)` float64, sum of squared deviations from `mean`.
        variance: `(C,)` float64, sum of the posteriors' variances; zero where there is none.
    """

    images: int
    count: int
    mean: np.ndarray
    squares: np.ndarray
    variance: np.ndarray

    @staticmethod
    def empty(channels: int) -> "ChannelSums":
        """No samples yet."""
        return ChannelSums(0, 0, *(np.zeros(channels) for _ in range(3)))

    @staticmethod
    def of(mean: Tensor, logvar: Tensor | None) -> "ChannelSums":
        """The sums over some samples.

        Args:
            mean: `(N, C, h, w)`.
            logvar: `(N, C, h, w)` log-variance, or `None` for latents without a posterior.
        """
        return ChannelSums.empty(mean.shape[1]).merge_samples(mean, logvar)

    def merge_samples(self, mean: Tensor, logvar: Tensor | None) -> "ChannelSums":
        """The sums over these samples too, one after the other.

        However samples are cut into portions, the result is the same bit for bit.
        """
        total = self
        # One sample at a time: a unit's latents in float64 would not be small.
        for n in range(len(mean)):
            values = mean[n].double().flatten(1)
            center = values.mean(1)
            spread = (values - center[:, None]).square_().sum(1)
            variance = torch.zeros_like(center)
            if logvar is not None:
                variance = logvar[n].double().flatten(1).exp().sum(1)
            parts = (part.numpy() for part in (center, spread, variance))
            total = total.merge(ChannelSums(1, values.shape[1], *parts))
        return total

    def merge(self, other: "ChannelSums") -> "ChannelSums":
        """The sums over both."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return ChannelSums(
            self.images + other.images,
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta**2 * (self.count * other.count / count),
            self.variance + other.variance,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values; Python writes floats so that they read back bit for bit."""
        return {
            "images": self.images,
            "count": self.count,
            "mean": self.mean.tolist(),
            "squares": self.squares.tolist(),
            "variance": self.variance.tolist(),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "ChannelSums":
        """What `to_json` gave."""
        arrays = (np.array(values[k], np.float64) for k in ("mean", "squares", "variance"))
        return ChannelSums(int(values["images"]), int(values["count"]), *arrays)


def summary(sums: ChannelSums, has_posterior: bool) -> dict[str, Any]:
    """The statistics as the manifest has them.

    Args:
        sums: The sums over all samples.
        has_posterior: Whether the latents are moments.

    Returns:
        `images`; per channel `mean` and `std` of the latents (population, ddof 0); for moments
        also `mean_std`, the spread of the posteriors' means, and `posterior_std`, the root of the
        mean posterior variance; over all channels `scaling_factor` = 1 / std and `shift_factor` =
        mean. Empty when there are no samples.
    """
    if sums.count == 0:
        return {}
    of_mean, of_posterior = sums.squares / sums.count, sums.variance / sums.count
    grand = float(sums.mean.mean())
    spread = float((of_mean + of_posterior + np.square(sums.mean - grand)).mean())
    result: dict[str, Any] = {
        "images": sums.images,
        "mean": sums.mean.tolist(),
        "std": np.sqrt(of_mean + of_posterior).tolist(),
    }
    if has_posterior:
        result["mean_std"] = np.sqrt(of_mean).tolist()
        result["posterior_std"] = np.sqrt(of_posterior).tolist()
    result["scaling_factor"] = 1.0 / math.sqrt(spread) if spread > 0 else 1.0
    result["shift_factor"] = grand
    return result
