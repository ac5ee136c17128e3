"""Held-out images: what is measured and shown of them during a run."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from first_stage.data import FixedImages, displayed, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.evaluation.code_pictures import draw_codes, draw_tokens
from first_stage.evaluation.codes import CodeCounts
from first_stage.evaluation.grids import grid
from first_stage.metrics import images as metrics
from first_stage.metrics.precision import float64_device, full_float32
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, reconstruct

METRICS = {"psnr": metrics.psnr, "ssim": metrics.ssim, "l1": metrics.l1}
"""Per-image metrics of 8-bit reconstructions from the posterior's mode."""


@full_float32()
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
        `psnr` in dB, `ssim`, and `l1` on the [-1, 1] scale. Images that are rebuilt exactly have
        no finite PSNR: they are left out of its mean and counted as `identical_images`; where all
        are, there is no `psnr`. Of a first stage with codes also `codes_used` (share of the codes
        that the images use), `codes_perplexity` and `codes_most_frequent` (share of the tokens).
    """
    device = stage.device
    is_measured = images.reading is not None and images.reading.value_range is not None
    grade = metrics.clamped if is_measured else metrics.eight_bit
    totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=float64_device(device))
    codes = CodeCounts(stage)
    for batch in _share(images.pixels, processes, batch_size):
        originals = images_from_pixels(batch.to(device))
        rebuilt, encoded = reconstruct(stage, originals)
        codes.update(encoded.latents)
        rebuilt = grade(rebuilt)
        originals = grade(originals)
        totals[-1] += (originals == rebuilt).flatten(1).all(1).sum().to(totals.device)
        for place, metric in enumerate(METRICS.values()):
            values = metric(originals, rebuilt)
            totals[place] += values[values != torch.inf].sum().to(totals)
    *sums, identical = processes.sum(totals).tolist()
    result = {name: total / len(images) for name, total in zip(METRICS, sums, strict=True)}
    if identical:
        different = len(images) - identical
        result["psnr"] *= len(images) / max(different, 1)
        if not different:
            del result["psnr"]
        result["identical_images"] = identical
    found = codes.summary(processes.sum)
    return result | {f"codes_{name}": value for name, value in found.items()}


def _share(pixels: Tensor, processes: Processes, batch_size: int) -> Iterator[Tensor]:
    mine = pixels[processes.rank :: processes.world]
    yield from mine.split(batch_size) if len(mine) else ()


@torch.no_grad()
def draw_pictures(stage: FirstStage, images: FixedImages, count: int) -> dict[str, Image.Image]:
    """Pictures of the held-out images, and of codes, by name.

    Args:
        stage: The first stage, in eval mode.
        images: The images; the first ones are shown.
        count: How many.

    Returns:
        `grid`, originals over reconstructions. Of a first stage with codes also `tokens`, originals
        over their tokens, and `codes`, the codes that training uses most.
    """
    originals = images_from_pixels(images.pixels[:count].to(stage.device))
    display = images.reading.display if images.reading is not None else None
    shown = displayed(originals.shape[1], display)
    found = {"grid": grid([originals[:, shown], reconstruct(stage, originals)[0][:, shown]])}
    if isinstance(stage.bottleneck, Discrete):
        found["tokens"] = draw_tokens(stage, originals, display)
        found["codes"] = draw_codes(stage, stage.bottleneck.usage, display)
    return found
