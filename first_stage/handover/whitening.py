"""Whitening: latents of covariance 1, folded into the 1x1 convolutions around them.

`folding` gives each channel mean 0 and variance 1; channels may still repeat each other. Here the
whole covariance goes: z' = W (z - m) with a matrix W, which a 1x1 convolution takes up as well as a
factor per channel, and its inverse into the other convolution.

Draws from a posterior have the covariance T = S + N, of their means and of their noise. W is chosen
so that W T W' = 1 and W N W' is diagonal: the generalized eigenvectors of N and T, the most signal
first. So the noise of the new channels is independent, as a diagonal posterior must have it. What
the class cannot hold is that the noise of an old channel, different from place to place, mixes into
several new ones: the new posterior has the average noise of each channel, everywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.handover.folding import store, with_convolutions
from first_stage.metrics.frechet import GaussianStatistics
from first_stage.models.bottlenecks import LOGVAR_MAX, LOGVAR_MIN
from first_stage.models.first_stage import FirstStage, as_first_stage

_LEAST = 1e-10
"""Variance of a direction, against the largest one, below which latents count as not having it."""


@dataclass(frozen=True)
class LatentCovariance:
    """Second moments of latents over images and places.

    Attributes:
        mean: `(C,)` float64, of the posteriors' means.
        signal: `(C, C)` float64, covariance of the posteriors' means.
        noise: `(C,)` float64, mean variance of the posteriors; 0 without one.
    """

    mean: Tensor
    signal: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """`(C, C)`, covariance of draws from the posteriors."""
        return self.signal + torch.diag(self.noise)


class CovarianceSums:
    """Second moments of latents, batch by batch.

    Args:
        channels: Channels of the latents (C).
    """

    def __init__(self, channels: int):
        self.statistics = GaussianStatistics(channels)
        self.noise = torch.zeros(channels, dtype=torch.float64)

    def update(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Count latents `(B, C, h, w)`, and the log-variances of their posteriors."""
        self.statistics.update(mean.movedim(1, -1).flatten(0, -2))
        if logvar is not None:
            self.noise += logvar.detach().cpu().double().exp().sum((0, 2, 3))

    def merged(self, processes: Processes) -> LatentCovariance:
        """The moments over all processes."""
        found = self.statistics.merged(processes.sum)
        count = max(found.count, 1)
        noise = processes.sum(self.noise)
        return LatentCovariance(found.mean.cpu(), (found.scatter / count).cpu(), noise / count)


@torch.no_grad()
def measure_covariance(
    first_stage: FirstStage | Any, batches: Iterable[Tensor], processes: Processes
) -> LatentCovariance:
    """Measure how the channels of the latents of images vary together.

    Args:
        first_stage: A first stage, or a loaded diffusers autoencoder, in float32.
        batches: This process's share of the images, `(B, C_in, H, W)` in [-1, 1].
        processes: The processes that share the images.
    """
    stage = as_first_stage(first_stage)
    sums = CovarianceSums(stage.latent_channels)
    for batch in batches:
        encoded = stage.encode(batch.to(stage.device))
        sums.update(encoded.latents.cpu(), encoded.logvar)
    return sums.merged(processes)


def whitening_matrix(found: LatentCovariance) -> tuple[Tensor, Tensor]:
    """W, and the noise of the new channels.

    Returns:
        `(C, C)` with W T W' = 1 and W N W' diagonal, rows in the order of less and less signal; and
        that diagonal, `(C,)` in [0, 1], the share of a channel's variance that is noise.

    Raises:
        UserError: When latents do not vary in every direction.
    """
    spread, directions = torch.linalg.eigh(found.total)
    if not bool(torch.isfinite(spread).all()) or spread[0] <= _LEAST * spread[-1]:
        varied = int((spread > _LEAST * spread[-1]).sum())
        raise UserError(
            f"the latents vary in {varied} of {len(spread)} directions only: what never varies "
            "cannot be given unit variance. Fold the statistics per channel (--fold_statistics), "
            "or train with fewer latent channels"
        )
    whitened = directions.mT / spread.sqrt()[:, None]
    noise, turn = torch.linalg.eigh(whitened @ torch.diag(found.noise) @ whitened.mT)
    return turn.mT @ whitened, noise.clamp(0, 1)


@torch.no_grad()
def fold_whitening(autoencoder: AutoencoderKL, found: LatentCovariance) -> AutoencoderKL:
    """An autoencoder whose raw latents are W (z - mean): mean 0 and covariance 1.

    Args:
        autoencoder: The autoencoder; it is not changed. Without the 1x1 convolutions around its
            latents it gets them, as in `fold_statistics`.
        found: How its latents vary.

    Returns:
        A copy with the same reconstructions. Its posteriors have the transformed means, and in
        every place the average noise of the new channels. Its config says scaling 1 and shift 0.

    Raises:
        UserError: When the class has no 1x1 convolutions, the latents have a codebook, or do not
            vary in every direction.
    """
    if isinstance(autoencoder, VQModel):
        raise UserError(
            "a codebook's latents are not whitened: turned and scaled apart, other codes would be "
            "nearest, and images change. Fold the statistics alone: --fold_statistics"
        )
    if not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            "whitening folds into the 1x1 convolutions of an AutoencoderKL; this is a "
            f"{type(autoencoder).__name__}, which has none: use its scaling_factor"
        )
    channels = autoencoder.config.latent_channels
    if len(found.mean) != channels:
        raise UserError(
            f"the covariance is of {len(found.mean)} channels; the autoencoder has {channels}"
        )
    matrix, noise = whitening_matrix(found)
    folded = with_convolutions(autoencoder)

    to_moments = folded.quant_conv
    weight, bias = to_moments.weight.double().cpu(), to_moments.bias.double().cpu()
    mean_rows = torch.einsum("ij,jkhw->ikhw", matrix, weight[:channels])
    logvar = noise.clamp_min(1e-300).log().clamp(LOGVAR_MIN, LOGVAR_MAX)
    store(to_moments.weight, torch.cat([mean_rows, torch.zeros_like(weight[channels:])]))
    store(to_moments.bias, torch.cat([matrix @ (bias[:channels] - found.mean), logvar]))

    from_latents = folded.post_quant_conv
    weight, bias = from_latents.weight.double().cpu(), from_latents.bias.double().cpu()
    store(from_latents.bias, bias + weight[:, :, 0, 0] @ found.mean)
    back = torch.linalg.inv(matrix)
    store(from_latents.weight, (weight[:, :, 0, 0] @ back)[:, :, None, None])

    folded.register_to_config(
        scaling_factor=1.0, shift_factor=0.0, latents_mean=None, latents_std=None
    )
    return folded
