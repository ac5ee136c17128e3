"""Held-out images: what is measured and shown of them during a run."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from first_stage.data import FixedImages, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.evaluation.codes import CodeCounts
from first_stage.evaluation.grids import grid
from first_stage.metrics import images as metrics
from first_stage.models.first_stage import FirstStage, reconstruct

METRICS = {"psnr": metrics.psnr, "ssim": metrics.ssim, "l1": metrics.l1}
"""Per-image metrics of 8-bit reconstructions from the posterior's mode."""


def validate(
    stage: FirstStage, images: FixedImages, processes: Processes, batch_size: int
) -> dict[str, float]:
    """Mean of each metric over the images, each counted once.

    Args:
        stage: The first stage, in eval mode.
        images: What to measure.
        processes: Share the images.
        batch_size: Images per forward pass.

    Returns:
        `psnr` in dB, `ssim`, and `l1` on the [-1, 1] scale; of a first stage with codes also
        `codes_used` (share of the codes that the images use), `codes_perplexity` and
        `codes_most_frequent` (share of the tokens).
    """
    device = stage.device
    totals = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
    codes = CodeCounts(stage)
    for batch in _share(images.pixels, processes, batch_size):
        originals = images_from_pixels(batch.to(device))
        rebuilt, encoded = reconstruct(stage, originals)
        codes.update(encoded.latents)
        rebuilt = metrics.eight_bit(rebuilt)
        originals = metrics.eight_bit(originals)
        for place, metric in enumerate(METRICS.values()):
            totals[place] += metric(originals, rebuilt).sum().to(totals)
    means = processes.sum(totals) / len(images)
    found = {f"codes_{name}": value for name, value in codes.summary(processes.sum).items()}
    return dict(zip(METRICS, means.tolist(), strict=True)) | found


def _share(pixels: Tensor, processes: Processes, batch_size: int) -> Iterator[Tensor]:
    mine = pixels[processes.rank :: processes.world]
    yield from mine.split(batch_size) if len(mine) else ()


def draw_grid(stage: FirstStage, images: FixedImages, count: int) -> Image.Image:
    """A grid of originals over reconstructions."""
    originals = images_from_pixels(images.pixels[:count].to(stage.device))
    return grid([originals, reconstruct(stage, originals)[0]])
