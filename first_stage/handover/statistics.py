"""Where `scaling_factor` and `shift_factor` are measured: the moments of the latents."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from first_stage.distributed.processes import Processes
from first_stage.metrics.moments import ChannelMoments, merged
from first_stage.metrics.precision import full_float32
from first_stage.models.first_stage import FirstStage, as_first_stage

_HALF_MAX = 65504.0
_HALF_HEADROOM = 4.0
_LEAST_STD = 1e-6
"""A channel that never varies still has a scaling factor that is a number."""


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of the posterior samples z ~ q(z|x) over images and places.

    Attributes:
        mean: Per channel.
        std: Per channel.
        overall_mean: Over all channels together: `shift_factor`.
        overall_std: Over all channels together, around that mean: 1 / `scaling_factor`.
        images: How many images were measured.
        largest_activation: Largest magnitude that any layer of encoder or decoder put out.
        resolution: Side of the images, in pixels: what it was trained on. The config cannot say
            it, because diffusers takes its `sample_size` for the size of a tile.
    """

    mean: list[float]
    std: list[float]
    overall_mean: float
    overall_std: float
    images: int
    largest_activation: float
    resolution: int | None = None

    @property
    def scaling_and_shift(self) -> tuple[float, float]:
        """`scaling_factor` and `shift_factor`."""
        return 1.0 / self.overall_std, self.overall_mean

    @property
    def needs_float32(self) -> bool:
        """Whether float16 comes within a factor 4 of its largest number: `force_upcast`."""
        return self.largest_activation * _HALF_HEADROOM > _HALF_MAX


@torch.no_grad()
@full_float32()
def measure_latents(
    first_stage: FirstStage | Any, batches: Iterable[Tensor], processes: Processes
) -> LatentStatistics:
    """Measure the latents of images.

    No sampling: the moments of draws follow exactly from the posteriors.

    Args:
        first_stage: A first stage, or a loaded diffusers autoencoder, in float32.
        batches: This process's share of the images, `(B, C, H, W)` in [-1, 1].
        processes: The processes that share the images.

    Returns:
        The statistics over all processes' images, summed in float64.
    """
    first_stage = as_first_stage(first_stage)
    device = first_stage.device
    found = ChannelMoments(first_stage.latent_channels)
    peak, side = torch.zeros((), device=device), 0
    with _largest_output(first_stage.model, peak):
        for batch in batches:
            encoded = first_stage.encode(batch.to(device))
            first_stage.decode(encoded.latents)
            found.update(encoded.latents, encoded.logvar)
            side = batch.shape[-1]
    total = merged(processes.gather(found), first_stage.latent_channels)
    overall_mean, overall_std = total.overall
    return LatentStatistics(
        mean=total.mean.tolist(),
        std=np.maximum(total.std, _LEAST_STD).tolist(),
        overall_mean=overall_mean,
        overall_std=max(overall_std, _LEAST_STD),
        images=total.images,
        largest_activation=processes.maximum(peak).item(),
        resolution=max(processes.gather(side)) or None,
    )


@contextmanager
def _largest_output(model: nn.Module, peak: Tensor) -> Iterator[None]:
    """Keep the largest magnitude that any layer puts out in `peak`."""

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            torch.maximum(peak, output.detach().abs().max(), out=peak)

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_hook(look) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
