"""Old and new decoder on the same latents: held-out images, and samples of one diffusion model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from experiments.diffusability.diffusion import decoded, sample_latents, train_diffusion
from experiments.diffusability.yardstick import Yardstick
from first_stage.config.images import ImagesConfig
from first_stage.evaluation import EvaluationImages, evaluate_change, save
from first_stage.evaluation.grids import grid, save_png
from first_stage.evaluation.measure import Options as Measured
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.report import write_report
from latent_tools import LatentDataset
from latent_tools.format.manifest import fingerprint_weights

SHEET = "samples.png"
"""The same latents through the old decoder and the new one."""
_SHOWN = 20


@dataclass(frozen=True)
class Samples:
    """What the judge says of one diffusion model's samples through one decoder.

    Attributes:
        distance: Frechet distance to real images in the judge's features.
        network: The same in the evaluation network's; `None` without.
        read_as_asked: Share of them that it reads as the class asked for.
    """

    distance: float
    network: float | None
    read_as_asked: float


@dataclass
class Found:
    """All that was found.

    Attributes:
        encoder_unchanged: Whether the encoders have the same hash.
        drift: Of the latents of the held-out images, as `Drift.summary` gives it.
        psnr: Mean over held-out images, before and after.
        gain: Summary of their gains in PSNR.
        cache_accepted: Whether the old cache opened with `expect=` the new first stage.
        reconstructions: The judge's distance of reconstructions, before and after.
        before: Samples through the old decoder, by seed.
        after: The same latents through the new one.
        judge_accuracy: Share of real held-out images that the judge reads right.
    """

    encoder_unchanged: bool
    drift: dict[str, Any]
    psnr: tuple[float, float]
    gain: dict[str, Any]
    cache_accepted: bool
    reconstructions: tuple[float, float]
    judge_accuracy: float
    before: list[Samples] = field(default_factory=list)
    after: list[Samples] = field(default_factory=list)


def cached(yardstick: Yardstick, first_stage: str, folder: Path) -> LatentDataset:
    """The domain's latents by the first stage as it was."""
    stage = FirstStage(load_autoencoder(first_stage), name="before")
    return yardstick.cached(stage, first_stage, folder)


def measure(
    yardstick: Yardstick,
    dataset: LatentDataset,
    before: str,
    after: str,
    config: ImagesConfig,
    seeds: Sequence[int],
    output: Path,
    keep: Callable[[Found], None],
) -> Found:
    """Measure both first stages and, for each seed, one diffusion model through both decoders.

    Args:
        yardstick: The domain's images, judge and budget.
        dataset: The old cache.
        before: The first stage that made it.
        after: The same with a fine-tuned decoder.
        config: How the images are seen.
        seeds: Of the diffusion models and their samples.
        output: For the evaluation and the picture of samples.
        keep: Called after each seed with what is found so far.
    """
    stages = [
        FirstStage(load_autoencoder(folder), name=name)
        for name, folder in (("before", before), ("after", after))
    ]
    prints = [fingerprint_weights(stage.model) for stage in stages]
    # Raises where the encoder is another one.
    LatentDataset(dataset.path, expect=after)
    images = yardstick.images
    held_out = EvaluationImages(
        images.held_out, config.reading(images.channels), config.view(images.resolution)
    )
    evaluation = evaluate_change(
        ("before", stages[0]), ("after", stages[1]), held_out, Measured(pairs=12)
    )
    save(evaluation, output / "evaluation")
    write_report(output / "evaluation")
    assert evaluation.change is not None
    psnr = [stage["metrics"]["psnr"]["mean"] for stage in evaluation.first_stages]
    floors = [yardstick.floor(stage) for stage in stages]
    accuracy = yardstick.judge_accuracy()
    assert accuracy is not None
    found = Found(
        encoder_unchanged=prints[0].encoder == prints[1].encoder,
        drift=evaluation.change["latents"],
        psnr=(psnr[0], psnr[1]),
        gain=evaluation.change["gains"]["psnr"],
        cache_accepted=True,
        reconstructions=(floors[0] or 0.0, floors[1] or 0.0),
        judge_accuracy=accuracy,
    )
    asked = torch.arange(yardstick.budget.samples) % yardstick.classes
    for seed in seeds:
        diffusion = train_diffusion(dataset, yardstick.classes_of(dataset), yardstick.budget, seed)
        latents = sample_latents(diffusion, asked, yardstick.budget, seed)
        pictures = [decoded(stage, latents) for stage in stages]
        if seed == seeds[0]:
            save_png(sheet(*pictures), output / SHEET)
        for results, some in zip((found.before, found.after), pictures, strict=True):
            distance, network, read = yardstick.held_against_real(some, asked)
            assert distance is not None
            assert read is not None
            results.append(Samples(distance, network, read))
        yardstick.say(f"seed {seed}: {found.before[-1]} -> {found.after[-1]}")
        keep(found)
    return found


def sheet(before: Tensor, after: Tensor) -> Image.Image:
    """Samples through the old decoder, and the same latents through the new one below, twice."""
    rows = [
        part[start : start + _SHOWN // 2]
        for start in range(0, _SHOWN, _SHOWN // 2)
        for part in (before, after)
    ]
    picture = grid([row for row in rows if len(row)])
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
