"""What the latents are like for the diffusion model that will be trained on them.

Everything is summed over images in float64 and can be merged from parts, so that several processes
measure what one would. Latents are raw (unscaled) modes of the posterior, `(B, C, h, w)`.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from first_stage.metrics.frechet import GaussianStatistics
from first_stage.metrics.images import mean_squared_error
from first_stage.metrics.moments import ChannelMoments
from first_stage.metrics.spectrum import (
    BINS,
    HIGH,
    cosine_transform,
    mean_energy,
    radial_frequency,
    ring_centres,
    ring_energy,
    slope,
)

ACTIVE = 0.01
"""A channel is active when its signal has more than this share of the posterior noise's variance
(Burda et al. 2016, section 5.2, whose threshold of 0.01 assumes a noise of variance 1)."""
_NO_NOISE = 1e-12
"""Variance that counts as signal where there is no posterior noise to compare it with."""


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each value in nats, of the arguments' shape.

    Kingma & Welling 2014, "Auto-encoding variational Bayes", appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def gaussian_divergence(
    mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor
) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(other_mean, exp(other_logvar))) of each value in nats.

    Of two diagonal Gaussians; with a standard normal as the other it is `kl_divergence`.
    """
    ratio = logvar - other_logvar
    moved = (mean - other_mean).square() * torch.exp(-other_logvar)
    return 0.5 * (moved + ratio.exp() - 1.0 - ratio)


def is_active(signal: float, noise: float | None) -> bool:
    """Whether a channel carries signal.

    Args:
        signal: Variance of its posteriors' means, or of its latents.
        noise: Mean variance of its posteriors; `None` without posteriors.
    """
    return signal > (_NO_NOISE if noise is None else ACTIVE * noise)


def redundancy(covariance: np.ndarray) -> float:
    """How far channels repeat each other, from 0 (not correlated) to 1 - 1/C (all the same).

    1 - R / C with the effective rank R of their correlation matrix: exp of the entropy of its
    eigenvalues' shares (Roy & Vetterli 2007). Linear maps of other channels count as repetition,
    whatever their size.

    Args:
        covariance: `(C, C)` of the channels; those that never vary are left out.
    """
    deviations = np.sqrt(np.clip(np.diag(covariance), 0, None))
    varies = deviations > 0
    if not varies.any():
        return 0.0
    scale = deviations[varies]
    eigenvalues = np.linalg.eigvalsh(covariance[np.ix_(varies, varies)] / np.outer(scale, scale))
    shares = np.clip(eigenvalues, 0, None) / np.clip(eigenvalues, 0, None).sum()
    entropy = -sum(s * math.log(s) for s in shares.tolist() if s > 0)
    return max(1.0 - math.exp(entropy) / len(scale), 0.0)


class HigherMoments(ChannelMoments):
    """The moments up to the fourth.

    Attributes:
        powers: `(2, C)` float64: sums of the cubed and fourth powers of the deviations.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.powers = np.zeros((2, channels))

    def update(self, mean: Tensor, logvar: Tensor | None = None) -> None:
        """Count latents `(B, C, h, w)`; see `ChannelMoments`."""
        part = self._of(mean, logvar)
        values = mean.detach().transpose(0, 1).flatten(1).cpu().double()
        deviation = values - values.mean(1)[:, None]
        part.powers = torch.stack([deviation.pow(k).sum(1) for k in (3, 4)]).numpy()
        self.merge(part)

    def merge(self, other: Self) -> None:
        """Add other values (Pebay 2008, equations 1.5 and 1.6 for two sets)."""
        if other.count == 0:
            return
        na, nb = self.count, other.count
        n = na + nb
        (a3, a4), (b3, b4), a2, b2 = self.powers, other.powers, self.squares, other.squares
        d = other.mean - self.mean
        m4 = (
            a4 + b4
            + d**4 * (na * nb * (na * na - na * nb + nb * nb) / n**3)
            + 6 * d**2 * (na * na * b2 + nb * nb * a2) / n**2
            + 4 * d * (na * b3 - nb * a3) / n
        )  # fmt: skip
        m3 = a3 + b3 + d**3 * (na * nb * (na - nb) / n**2) + 3 * d * (na * b2 - nb * a2) / n
        self.powers = np.stack([m3, m4])
        super().merge(other)

    @property
    def excess_kurtosis(self) -> np.ndarray:
        """Fourth standardized moment minus 3: 0 for a Gaussian; NaN for a constant channel."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.count * self.powers[1] / self.squares**2 - 3.0


class LatentHealth:
    """Statistics of the latents of a first stage, image by image.

    Args:
        channels: Channels of the latents.
    """

    def __init__(self, channels: int):
        self.images = 0
        self.moments = HigherMoments(channels)
        self.together = GaussianStatistics(channels)
        self.kl = np.zeros(channels)
        self.noise = np.zeros(channels)
        self.posteriors = 0
        self.energy = np.zeros((channels, BINS))
        self.count = np.zeros(BINS)
        self.total = np.zeros(channels)
        self.high = np.zeros(channels)

    def update(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Count a batch.

        Args:
            mean: `(B, C, h, w)`, the posterior's modes, or the latents of a first stage without a
                posterior.
            logvar: Logarithm of the posterior's variance, of the same shape, or `None`.
        """
        self.images += len(mean)
        self.moments.update(mean)
        self.together.update(mean.movedim(1, -1).flatten(0, -2).cpu())
        if logvar is not None:
            self.posteriors += len(mean)
            mu, lv = mean.cpu().double(), logvar.cpu().double()
            self.kl += kl_divergence(mu, lv).sum((0, 2, 3)).numpy()
            self.noise += lv.exp().mean((2, 3)).sum(0).numpy()
        energy = cosine_transform(mean).square().cpu()
        rings, count = ring_energy(energy)
        self.energy += rings.sum(0).numpy()
        self.count += len(mean) * count.numpy()
        energy[..., 0, 0] = 0.0
        fine = radial_frequency(*mean.shape[-2:]) >= HIGH
        self.total += energy.sum((0, 2, 3)).numpy()
        self.high += energy[..., fine].sum((0, 2)).numpy()

    def merge(self, other: "LatentHealth") -> None:
        """Add other images."""
        self.images += other.images
        self.posteriors += other.posteriors
        self.moments.merge(other.moments)
        self.together.merge(other.together)
        for name in ("kl", "noise", "energy", "count", "total", "high"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """Everything by channel and over channels; `None` where a figure does not exist.

        Returns:
            `channels` with one entry per channel: `mean`, `std`, `excess_kurtosis`, `kl` (nats per
            image, summed over positions), `noise_std`, `signal_to_noise` (variance of the modes
            over the posterior's variance), `active`, `variance_share` (of the sum over channels).
            `active_channels`. `kl` (nats per image). `redundancy` (see there). `spectrum`:
            `frequency` in cycles per latent, `energy` per coefficient with every channel scaled to
            the same total, `slope` (see `metrics.spectrum.slope`), and `high_frequency_share`, the
            mean share of a channel's energy at a quarter of a cycle and above; white noise has
            about 0.8.
        """
        m = self.moments
        posterior = self.posteriors > 0
        n = max(self.posteriors, 1)
        signal = m.signal_variance
        noise = self.noise / n
        active = [
            is_active(float(s), float(v) if posterior else None)
            for s, v in zip(signal, noise, strict=True)
        ]
        channels = [
            {
                "mean": float(m.mean[c]),
                "std": math.sqrt(max(float(signal[c]), 0.0)),
                "excess_kurtosis": _number(m.excess_kurtosis[c]),
                "kl": float(self.kl[c] / n) if posterior else None,
                "noise_std": math.sqrt(float(noise[c])) if posterior else None,
                "signal_to_noise": _number(signal[c] / noise[c]) if posterior else None,
                "active": active[c],
                "variance_share": _number(signal[c] / signal.sum()) if signal.sum() > 0 else None,
            }
            for c in range(len(signal))
        ]
        # A channel of large values would hide the others; each counts with a total of 1.
        shown = self.total > 0
        scaled = self.energy[shown] / self.total[shown, None]
        coefficients = self.count / max(self.images, 1)
        relative = mean_energy(scaled.mean(0), coefficients) if shown.any() else [None] * BINS
        share = float((self.high[shown] / self.total[shown]).mean()) if shown.any() else None
        return {
            "posterior": posterior,
            "channels": channels,
            "active_channels": sum(active),
            "kl": float(self.kl.sum() / n) if posterior else None,
            "redundancy": redundancy(self.together.scatter.numpy()),
            "spectrum": {
                "frequency": ring_centres(),
                "energy": relative,
                "slope": slope(ring_centres(), relative),
                "high_frequency_share": share,
            },
        }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _half(x: Tensor) -> Tensor:
    size = (max(x.shape[-2] // 2, 1), max(x.shape[-1] // 2, 1))
    return F.interpolate(x, size, mode="bilinear", antialias=True)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "rotate_90": lambda x: x.rot90(1, (-2, -1)),
    "scale_0.5": _half,
}
"""Transforms of latents, and the same of images."""


def equivariance(
    decode: Callable[[Tensor], Tensor], latents: Tensor, images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What happens to reconstructions when latents are flipped, turned or scaled.

    A first stage whose decoder follows such changes has latents that look like small images; a
    diffusion model learns them more easily (Kouzelis et al. 2025, EQ-VAE, equation 3).

    Args:
        decode: Latents to images.
        latents: `(B, C, h, w)`.
        images: `(B, C_in, H, W)` in [-1, 1], what the latents encode.

    Returns:
        For each transform T the mean squared errors `(B,)`, values in [0, 1], of the decoded
        transformed latents: against the transformed images, |T x - D(T z)|^2, and against the
        transformed reconstructions, |T D(z) - D(T z)|^2, which is the change by T alone.
    """
    reconstructions = decode(latents).clamp(-1, 1)
    result = {}
    for name, transform in TRANSFORMS.items():
        decoded = decode(transform(latents)).clamp(-1, 1)
        wanted = []
        for target in (images, reconstructions):
            moved = transform(target)
            if moved.shape != decoded.shape:  # an odd number of latents was halved
                moved = F.interpolate(target, decoded.shape[-2:], mode="bilinear", antialias=True)
            wanted.append(mean_squared_error(moved, decoded))
        result[name] = (wanted[0], wanted[1])
    return result
