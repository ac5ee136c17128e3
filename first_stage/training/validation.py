"""Held-out images: what is measured and shown of them during a run."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from first_stage.data import FixedImages, displayed, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.evaluation.grids import grid
from first_stage.metrics import images as metrics

METRICS = {"psnr": metrics.psnr, "ssim": metrics.ssim, "l1": metrics.l1}
"""Per-image metrics of 8-bit reconstructions from the posterior's mode."""


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Reconstructions from the posterior's mode, in float32.

    Args:
        vae: The autoencoder.
        images: `(B, C, H, W)` in [-1, 1], on its device.
    """
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.float()


def validate(
    vae: AutoencoderKL, images: FixedImages, processes: Processes, batch_size: int
) -> dict[str, float]:
    """Mean of each metric over the images, each counted once.

    Args:
        vae: The autoencoder, in eval mode.
        images: What to measure.
        processes: Share the images.
        batch_size: Images per forward pass.

    Returns:
        `psnr` in dB, `ssim`, and `l1` on the [-1, 1] scale.
    """
    device = next(vae.parameters()).device
    is_measured = images.reading is not None and images.reading.value_range is not None
    grade = metrics.clamped if is_measured else metrics.eight_bit
    totals = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    for batch in _share(images.pixels, processes, batch_size):
        originals = images_from_pixels(batch.to(device))
        rebuilt = grade(reconstruct(vae, originals))
        originals = grade(originals)
        for place, metric in enumerate(METRICS.values()):
            totals[place] += metric(originals, rebuilt).sum().to(totals)
    means = processes.sum(totals) / len(images)
    return dict(zip(METRICS, means.tolist(), strict=True))


def _share(pixels: Tensor, processes: Processes, batch_size: int) -> Iterator[Tensor]:
    mine = pixels[processes.rank :: processes.world]
    yield from mine.split(batch_size) if len(mine) else ()


def draw_grid(vae: AutoencoderKL, images: FixedImages, count: int) -> Image.Image:
    """A grid of originals over reconstructions."""
    device = next(vae.parameters()).device
    originals = images_from_pixels(images.pixels[:count].to(device))
    display = images.reading.display if images.reading is not None else None
    shown = displayed(originals.shape[1], display)
    return grid([originals[:, shown], reconstruct(vae, originals)[:, shown]])
