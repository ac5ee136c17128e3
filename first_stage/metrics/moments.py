"""Moments of latents by channel: exact, in float64, and merged from parts without cancellation.

The one accumulator of the toolkit: the export's scaling and shift, the evaluator's channels and a
cache's statistics all come from it.

The latents a diffusion model sees are draws z = mean + std * noise, so over a data set
Var(z) = Var(mean) + E[std^2]: the spread of the means plus the average posterior variance.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from torch import Tensor


class ChannelMoments:
    """Count, mean and squared deviations of each channel, and the posteriors' variances.

    Chan, Golub & LeVeque 1979: merging (n, mean, sum of squared deviations) cancels nothing, unlike
    sums of squares.

    Args:
        channels: Channels of the latents (C).

    Attributes:
        images: Number of samples.
        count: Values per channel: samples times h times w.
        mean: `(C,)` float64, mean of the posteriors' means (of the latents where there is no
            posterior).
        squares: `(C,)` float64, sum of squared deviations from `mean`.
        noise: `(C,)` float64, sum of the posteriors' variances; zero where there is none.
    """

    def __init__(self, channels: int):
        self.images = self.count = 0
        self.mean, self.squares, self.noise = (np.zeros(channels) for _ in range(3))

    def update(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        """Count latents.

        Args:
            mean: `(B, C, h, w)`, means of posteriors, or latents without one.
            logvar: Log-variance of the posteriors, of the same shape, or `None`.
        """
        self.merge(self._of(mean, logvar))

    def _of(self, mean: Tensor, logvar: Tensor | None) -> Self:
        part = type(self)(mean.shape[1])
        values = _by_channel(mean)
        part.images, part.count = len(mean), values.shape[1]
        center = values.mean(1)
        part.mean = center.numpy()
        part.squares = (values - center[:, None]).square().sum(1).numpy()
        if logvar is not None:
            part.noise = _by_channel(logvar).exp().sum(1).numpy()
        return part

    def merge(self, other: Self) -> None:
        """Add other values; the order of merging decides about the last bits alone."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        self.noise = self.noise + other.noise
        self.images, self.count = self.images + other.images, count

    @property
    def signal_variance(self) -> np.ndarray:
        """Variance of each channel's means, `(C,)`, dividing by the count."""
        return self.squares / max(self.count, 1)

    @property
    def noise_variance(self) -> np.ndarray:
        """Mean variance of each channel's posteriors, `(C,)`."""
        return self.noise / max(self.count, 1)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of draws from the posteriors, `(C,)`."""
        return np.sqrt(self.signal_variance + self.noise_variance)

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of draws over all channels together."""
        mean = float(self.mean.mean())
        spread = self.signal_variance + self.noise_variance + np.square(self.mean - mean)
        return mean, float(np.sqrt(spread.mean()))

    def to_json(self) -> dict[str, Any]:
        """As JSON values; Python writes floats so that they read back bit for bit."""
        return {
            "images": self.images,
            "count": self.count,
            "mean": self.mean.tolist(),
            "squares": self.squares.tolist(),
            "variance": self.noise.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        mean, squares, noise = (
            np.array(values[name], np.float64) for name in ("mean", "squares", "variance")
        )
        return cls.of_sums(int(values["images"]), int(values["count"]), mean, squares, noise)

    @classmethod
    def of_sums(
        cls, images: int, count: int, mean: np.ndarray, squares: np.ndarray, noise: np.ndarray
    ) -> Self:
        """What was summed elsewhere; see the attributes."""
        moments = cls(len(mean))
        moments.images, moments.count = images, count
        moments.mean, moments.squares, moments.noise = mean, squares, noise
        return moments

    @classmethod
    def of_images(
        cls, count: int, means: np.ndarray, squares: np.ndarray, noise: np.ndarray
    ) -> Self:
        """Images whose sums were taken one by one, merged in one step.

        Args:
            count: Values per channel of each image.
            means: `(N, C)` float64, each image's means.
            squares: `(N, C)` float64, each image's squared deviations from its means.
            noise: `(N, C)` float64, each image's summed variances.
        """
        if not len(means):
            return cls(means.shape[1])
        mean = means.mean(0)
        between = np.square(means - mean).sum(0)
        squares = squares.sum(0) + count * between
        return cls.of_sums(len(means), count * len(means), mean, squares, noise.sum(0))


def merged(parts: Iterable[ChannelMoments], channels: int) -> ChannelMoments:
    """The parts merged in the order given."""
    total = ChannelMoments(channels)
    for part in parts:
        total.merge(part)
    return total


def _by_channel(latents: Tensor) -> Tensor:
    """`(B, C, h, w)` as `(C, B h w)`, float64 on the CPU: Apple's GPUs have no float64."""
    return latents.detach().transpose(0, 1).flatten(1).cpu().double()
