"""Terms of the latents that make them easier for a diffusion model, without a pretrained network.

variance    no channel's variance collapses
spectrum    the latents' energy lies at the frequencies where a small image has its own
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from first_stage.config.losses import LatentTermConfig, LossConfig
from first_stage.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from first_stage.losses.lagged_means import LaggedMeans
from first_stage.losses.terms import LatentTerm, Surroundings
from first_stage.metrics.spectrum import coefficients, radial_frequency
from first_stage.models.bottlenecks import Code
from first_stage.models.disturb import scaled

_TINY = 1e-8
_FINEST = 0.5**0.5
"""What the frequency of a checkerboard, half a cycle along both axes, comes to."""


@dataclass(frozen=True)
class VarianceConfig(LatentTermConfig):
    """Variance preservation: a price on channels that hardly vary."""

    floor: PositiveFloat = 0.1
    """Added to each channel's variance (d in the mean of 1 / (variance + d)): what the price of a
    channel that never varies is bounded by."""


class Variance(LatentTerm):
    """The mean over channels of 1 / (variance + floor), "VE" (2603.21085)."""

    name, section = "variance", VarianceConfig

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        self.means: LaggedMeans = surroundings.means

    def latent_value(self, code: Code, images: Tensor) -> Tensor | None:
        """A mean over channels, of variances over samples and places without posterior noise.

        The moments are those of earlier steps, averaged over processes and micro-batches; of a
        step's own, value and gradient would depend on how its batch is split. In the first step
        there are none yet.
        """
        z = code.signal
        self.means.observe("variance/mean", z.mean((0, 2, 3)))
        self.means.observe("variance/square", z.square().mean((0, 2, 3)))
        mean, square = self.means.get("variance/mean"), self.means.get("variance/square")
        if mean is None or square is None:
            return None
        return inverse_variance(z, mean, square - mean.square(), self.config.floor)


def moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of latents `(B, C, h, w)`, `(C,)` each."""
    axes = (0, 2, 3)
    return latents.mean(axes), latents.var(axes, unbiased=False)


def inverse_variance(latents: Tensor, mean: Tensor, variance: Tensor, floor: float) -> Tensor:
    """The mean over channels of 1 / (variance + floor), with the latents' gradient.

    d/dz of it is -2 (z - mean) / (variance + floor)^2 over the number of values, which is exact
    where the moments are those of the latents.

    Args:
        latents: `(B, C, h, w)`.
        mean: Of each channel, `(C,)`, without a graph.
        variance: Likewise.
        floor: Above 0.
    """
    price = 1.0 / (variance.clamp_min(0) + floor)
    spread = (latents - mean[:, None, None]).square().mean((0, 2, 3))
    return (price - price.square() * (spread - spread.detach())).mean()


@dataclass(frozen=True)
class SpectrumConfig(LatentTermConfig):
    """Spectrum matching: the latents' energy by frequency like that of the image, flattened."""

    flattening: NonNegativeFloat = 1.0
    """The image's energy is multiplied with the frequency to this power; 0: matched as it is, 2:
    about white."""
    bins: PositiveInt = 16
    """Rings of frequencies."""


class Spectrum(LatentTerm):
    """How far the latents' spectrum is from the image's, "ESM" (2603.14645)."""

    name, section = "spectrum", SpectrumConfig

    def latent_value(self, code: Code, images: Tensor) -> Tensor:
        """KL divergence in nats between shares of rings, a mean over samples."""
        return spectrum_distance(code.signal, images, self.config.bins, self.config.flattening)


def spectrum_distance(latents: Tensor, images: Tensor, bins: int, flattening: float) -> Tensor:
    """KL(p || q) between the shares of rings in a flattened image and in latents, over samples.

    The share of a ring follows log(1 + P), P the mean squared coefficient of the cosine transform
    in it, over channels, against the sample's mean over all coefficients but the constant one: so
    neither the size of latents nor of images matters. The image, made as small as the latents, is
    flattened by the frequency to a power before.

    Args:
        latents: `(B, C, h, w)`.
        images: `(B, C_in, H, W)`.
        bins: Rings from 0 to the diagonal's highest frequency; empty ones play no part.
        flattening: The power.

    Returns:
        A mean over samples; 0 where the shares are the same.
    """
    size = latents.shape[-2], latents.shape[-1]
    with torch.autocast(latents.device.type, enabled=False):
        weights = _flattening(*size, flattening, latents.dtype, latents.device)
        small = scaled(images.detach(), size).to(latents.dtype)
        wanted = _shares(coefficients(small).square() * weights, bins)
        found = _shares(coefficients(latents).square(), bins)
        return (wanted * (wanted.log() - found.log())).sum(1).mean()


def _shares(energy: Tensor, bins: int) -> Tensor:
    """Shares of rings `(B, R)` from squared coefficients `(B, C, h, w)`."""
    rings = _rings(energy.shape[-2], energy.shape[-1], bins, energy.dtype, energy.device)
    power = energy.mean(1).flatten(1) @ rings
    every = energy.mean(1).flatten(1)[:, 1:].mean(1, keepdim=True)
    height = torch.log1p(power / (every + _TINY)) + _TINY
    return height / height.sum(1, keepdim=True)


@functools.lru_cache(maxsize=16)
def _flattening(
    height: int, width: int, power: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The frequency of each coefficient to a power, `(h, w)`."""
    return radial_frequency(height, width).pow(power).to(device, dtype)


@functools.lru_cache(maxsize=16)
def _rings(height: int, width: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What averages coefficients over rings, `(h w, R)`: the constant one belongs to none."""
    frequency = radial_frequency(height, width).flatten()
    ring = (frequency / _FINEST * bins).long().clamp_max(bins - 1)
    member = torch.nn.functional.one_hot(ring, bins).double()
    member[0] = 0.0
    member = member[:, member.sum(0) > 0]
    return (member / member.sum(0)).to(device, dtype)
