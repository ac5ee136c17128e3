"""What `first-stage export` does to latents: `--fold_statistics`, `--whiten`, `--keep_channels`.

Means, deviations or the whole covariance of the latents come from a cache, from images, or from
what an export of ours has beside its config; `handover.folding` and `handover.whitening` put them
into the 1x1 convolutions, `handover.fewer_channels` leaves channels out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel

from first_stage.config.images import ImagesConfig
from first_stage.config.types import PositiveInt
from first_stage.data import fixed_images, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError
from first_stage.handover.card import load_lines_of, padding_remark
from first_stage.handover.fewer_channels import keep_channels
from first_stage.handover.folding import common_deviation, fold_statistics
from first_stage.handover.public import public_name
from first_stage.handover.statistics import measure_latents
from first_stage.handover.whitening import (
    CovarianceSums,
    LatentCovariance,
    fold_whitening,
    measure_covariance,
)
from first_stage.metrics.images import psnr
from first_stage.metrics.latents import redundancy
from first_stage.models.first_stage import FirstStage, reconstruct
from first_stage.models.loading import STATISTICS_FILE, training_resolution
from latent_tools import LatentDataset

_AT_ONCE = 16


@dataclass(frozen=True)
class ExportData(ImagesConfig):
    """Images to measure the latents on."""

    path: str | None = None
    """As in training; null: the statistics that the first stage's config has."""
    images: PositiveInt = 1000
    """How many images at most."""


@dataclass(frozen=True)
class Measured:
    """A first stage, and where the statistics of its latents come from.

    Attributes:
        first_stage: What the user called it.
        vae: The loaded diffusers autoencoder.
        latents: A cache that it made; before anything else.
        data: Images to measure on; before what lies beside its config.
    """

    first_stage: str
    vae: Any
    latents: str | None
    data: ExportData


def standard(measured: Measured, whiten: bool) -> tuple[Any, str, dict[str, Any]]:
    """The first stage with standard latents; prints what was folded.

    Args:
        measured: The first stage as it is.
        whiten: Fold the whole covariance, instead of each channel's own statistics.

    Returns:
        The changed copy, its card, and the contents of its `STATISTICS_FILE`.

    Raises:
        ConfigError: When there are no statistics to fold.
    """
    vae = measured.vae
    if whiten:
        found = covariance(measured)
        folded = fold_whitening(vae, found)
        mean, std = found.mean.tolist(), found.total.diagonal().sqrt().tolist()
        print(f"channels repeated others by {redundancy(found.total.numpy()):.0%}")
    else:
        mean, std = statistics(measured)
        if isinstance(vae, VQModel):
            std = common_deviation(std)
        folded = fold_statistics(vae, mean, std)
    print("channel   mean      std       are now 0 and 1")
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        print(f"{channel:<9} {m:<9.4f} {s:<9.4f}")
    if getattr(vae, "quant_conv", None) is None:
        print("the first stage had no 1x1 convolutions around the latents; it has them now")
    known: dict[str, Any] = {"mean": [0.0] * len(mean), "std": [1.0] * len(std)}
    known["resolution"] = training_resolution(measured.first_stage, vae)
    return folded, _card(measured, whiten, mean, std), known


@torch.no_grad()
def fewer(
    measured: Measured, count: int, known: dict[str, Any] | None
) -> tuple[Any, dict[str, Any] | None, str]:
    """The first stage with its first latent channels alone; prints what that costs on images.

    Args:
        measured: The first stage, whitened or folded already where that is asked for.
        count: How many channels are kept.
        known: The contents of its `STATISTICS_FILE`; `None` where there is none.

    Returns:
        The smaller copy, the contents of its `STATISTICS_FILE`, and what its card says of it.
    """
    vae = measured.vae
    small = keep_channels(vae, count)
    had = FirstStage(vae).latent_channels
    said = f"the first {count} of {had} latent channels"
    if known is not None:
        mean, std = np.array(known["mean"][:count]), np.array(known["std"][:count])
        overall = float(mean.mean()), float(np.sqrt((std**2 + (mean - mean.mean()) ** 2).mean()))
        known = known | {"mean": mean.tolist(), "std": std.tolist()}
        known |= {"overall_mean": overall[0], "overall_std": overall[1]}
        FirstStage(small).family.carrier.write(small, 1.0 / overall[1], overall[0])
    if measured.data.path is not None:
        both: list[list[torch.Tensor]] = [[], []]
        for batch in images(measured):
            for model, found in zip((small, vae), both, strict=True):
                found.append(psnr(batch, reconstruct(FirstStage(model), batch)[0].clamp(-1, 1)))
        few, whole = (torch.cat(found) for found in both)
        said += f": PSNR {few.mean():.2f} dB on {len(few)} images, {whole.mean():.2f} with all"
    print(f"channels  {said}")
    return small, known, f"\nIt has {said}; a diffusion model has that many fewer to learn.\n"


def statistics(measured: Measured) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the latents: of a cache, of data, of the config.

    Raises:
        ConfigError: When there are none.
    """
    vae = measured.vae
    if measured.latents is not None:
        cached = LatentDataset(measured.latents, expect=vae).stats
        return list(cached["mean"]), list(cached["std"])
    if measured.data.path is not None:
        found = measure_latents(FirstStage(vae), images(measured), Processes())
        return found.mean, found.std
    ours = Path(measured.first_stage) / STATISTICS_FILE
    if ours.is_file():
        known = json.loads(ours.read_text(encoding="utf-8"))
        return list(known["mean"]), list(known["std"])
    mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is None or std is None:
        raise ConfigError(
            f"{measured.first_stage!r} has no {STATISTICS_FILE}, and its config no latents_mean "
            "and latents_std: measure them with --data.path, or take a cache's with --latents"
        )
    return list(mean), list(std)


def covariance(measured: Measured) -> LatentCovariance:
    """How the channels of the latents vary together: from a cache, or from data.

    Raises:
        ConfigError: When neither is given.
    """
    vae = measured.vae
    if measured.latents is not None:
        cached = LatentDataset(measured.latents, sample="raw", normalize="none", expect=vae)
        channels = cached.manifest.first_stage["latent_channels"]
        sums = CovarianceSums(channels)
        for index in range(len(cached)):
            moments = cached[index]["latents"][None]
            mean, logvar = moments[:, :channels], moments[:, channels:]
            sums.update(mean, logvar if logvar.numel() else None)
        return sums.merged(Processes())
    if measured.data.path is None:
        raise ConfigError(
            "--whiten needs the covariance of the latents, which no config holds: measure it with "
            "--data.path, or take a cache's with --latents"
        )
    return measure_covariance(vae, images(measured), Processes())


def images(measured: Measured) -> Iterator[torch.Tensor]:
    """Batches of images `(B, C, H, W)` in [-1, 1] to measure on.

    Raises:
        ConfigError: When nothing says their resolution, or the downsample factor does not fit it.
    """
    vae, data = measured.vae, measured.data
    stage = FirstStage(vae)
    factor = stage.downsample_factor
    resolution = data.resolution or training_resolution(measured.first_stage, vae)
    if resolution is None:
        raise ConfigError(
            "data.resolution is missing, and the first stage does not say what it was trained on"
        )
    if resolution % factor:
        raise ConfigError(
            f"data.resolution is {resolution}; it must be a multiple of the downsample factor "
            f"{factor}"
        )
    view, reading = data.view(resolution), data.reading(stage.in_channels)
    found = fixed_images(data.open("train", say=print), view, reading, data.images, seed=0)
    for pixels in found.pixels.split(_AT_ONCE):
        yield images_from_pixels(pixels)


def _card(measured: Measured, whiten: bool, mean: list[float], std: list[float]) -> str:
    """The folder's README."""
    vae = measured.vae
    loading = "\n".join(load_lines_of(vae, "this-folder"))
    rows = "\n".join(
        f"| {channel} | {m:.6f} | {s:.6f} |"
        for channel, (m, s) in enumerate(zip(mean, std, strict=True))
    )
    folded = ("statistics", "(z there - mean) / std")
    if whiten:
        folded = ("covariance", "W (z there - mean), with a matrix W and channels that are not "
                  "correlated")  # fmt: skip
    return f"""---
library_name: diffusers
tags: [autoencoder, latent-diffusion, first-stage]
---

# First stage with standard latents

`{public_name(measured.first_stage)}` with the {folded[0]} of its latents folded into the 1x1
convolutions around them. Reconstructions are the same; every latent channel has mean 0 and variance
1 over the images measured, `scaling_factor` is 1 and there is no shift to forget. Latents of the
two are not interchangeable: z here is {folded[1]}.

{padding_remark(vae)}```python
{loading}
latents = vae.encode(images).{FirstStage(vae).family.encoded_as}
```

| channel | mean | std |
|---|---|---|
{rows}
"""
