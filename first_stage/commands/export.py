"""The command `first-stage export`: a first stage with its latents' statistics in its weights."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from first_stage.command_line import command_line
from first_stage.config.images import ImagesConfig
from first_stage.config.parsing import read_options
from first_stage.config.types import PositiveInt
from first_stage.data import fixed_images, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError
from first_stage.files import write_folder, write_json
from first_stage.handover.folding import common_deviation, fold_statistics
from first_stage.handover.public import public_name
from first_stage.handover.statistics import measure_latents
from first_stage.handover.whitening import (
    CovarianceSums,
    LatentCovariance,
    fold_whitening,
    measure_covariance,
)
from first_stage.metrics.latents import redundancy
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import (
    STATISTICS_FILE,
    load_autoencoder,
    training_resolution,
)
from latent_tools import LatentDataset

_AT_ONCE = 16
_SWITCHES = {"--fold_statistics": "true", "--whiten": "true"}


@dataclass(frozen=True)
class ExportData(ImagesConfig):
    """Images to measure the latents on."""

    path: str | None = None
    """As in training; null: the statistics that the first stage's config has."""
    images: PositiveInt = 1000
    """How many images at most."""


@dataclass(frozen=True)
class Options:
    """Write a first stage anew, so that no pipeline can scale or shift its latents wrongly."""

    first_stage: str = ""
    """A diffusers AutoencoderKL or VQModel: the folder of an export, a pipeline's folder, or a hub
    id."""
    output: str = ""
    """The folder to write; it must not be there yet."""
    fold_statistics: bool = False
    """Fold the per-channel mean and standard deviation of the latents into the 1x1 convolutions:
    the same reconstructions, latents with mean 0 and variance 1, scaling_factor 1, no shift."""
    whiten: bool = False
    """Instead, fold the whole covariance of the latents into them: channels that do not repeat each
    other, the most signal first. Measured on images or a cache; each channel's posterior noise
    becomes its average."""
    latents: str | None = None
    """Take the statistics of this cache, which the first stage made."""
    data: ExportData = field(default_factory=ExportData)
    """Or measure them on these images."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fold, write, and say what came of it.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options = parse_options(arguments)
    if Path(options.output).exists():
        raise ConfigError(f"output {options.output!r} is already there: give another folder")
    vae = load_autoencoder(options.first_stage, field="--first_stage")
    if options.whiten:
        found = covariance(options, vae)
        folded = fold_whitening(vae, found)
        mean, std = found.mean.tolist(), found.total.diagonal().sqrt().tolist()
        print(f"channels repeated others by {redundancy(found.total.numpy()):.0%}")
    else:
        mean, std = statistics(options, vae)
        if isinstance(vae, VQModel):
            std = common_deviation(std)
        folded = fold_statistics(vae, mean, std)
    print("channel   mean      std       are now 0 and 1")
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        print(f"{channel:<9} {m:<9.4f} {s:<9.4f}")
    if getattr(vae, "quant_conv", None) is None:
        print("the first stage had no 1x1 convolutions around the latents; it has them now")

    def write(folder: Path) -> None:
        folded.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(card(options, vae, mean, std), encoding="utf-8")
        standard: dict[str, Any] = {"mean": [0.0] * len(mean), "std": [1.0] * len(std)}
        standard["resolution"] = training_resolution(options.first_stage, vae)
        write_json(folder / STATISTICS_FILE, standard)

    write_folder(Path(options.output), write)
    cache = ("--first_stage", options.output, "--data.path", "DATA", "--output", "CACHE")
    print(
        f"export    {options.output} (scaling_factor 1, no shift)\n"
        "Load it with diffusers:\n"
        f"  from diffusers import {type(vae).__name__}\n"
        f"  vae = {type(vae).__name__}.from_pretrained({options.output!r})\n"
        "Latents cached with the first stage as it was belong to that one; cache anew:\n"
        f"  {command_line('cache', *cache, processes=1)}"
    )


def statistics(options: Options, vae: Any) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of the latents: of a cache, of data, of the config.

    Raises:
        ConfigError: When there are none.
    """
    if options.latents is not None:
        cached = LatentDataset(options.latents, expect=vae).stats
        return list(cached["mean"]), list(cached["std"])
    if options.data.path is not None:
        measured = measure_latents(FirstStage(vae), images(options, vae), Processes())
        return measured.mean, measured.std
    ours = Path(options.first_stage) / STATISTICS_FILE
    if ours.is_file():
        found = json.loads(ours.read_text(encoding="utf-8"))
        return list(found["mean"]), list(found["std"])
    mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is None or std is None:
        raise ConfigError(
            f"{options.first_stage!r} has no {STATISTICS_FILE}, and its config no latents_mean and "
            "latents_std: measure them with --data.path, or take a cache's with --latents"
        )
    return list(mean), list(std)


def covariance(options: Options, vae: Any) -> LatentCovariance:
    """How the channels of the latents vary together: from a cache, or from data.

    Raises:
        ConfigError: When neither is given.
    """
    if options.latents is not None:
        cached = LatentDataset(options.latents, sample="raw", normalize="none", expect=vae)
        channels = cached.manifest.first_stage["latent_channels"]
        sums = CovarianceSums(channels)
        for index in range(len(cached)):
            moments = cached[index]["latents"][None]
            mean, logvar = moments[:, :channels], moments[:, channels:]
            sums.update(mean, logvar if logvar.numel() else None)
        return sums.merged(Processes())
    if options.data.path is None:
        raise ConfigError(
            "--whiten needs the covariance of the latents, which no config holds: measure it with "
            "--data.path, or take a cache's with --latents"
        )
    return measure_covariance(vae, images(options, vae), Processes())


def images(options: Options, vae: Any) -> Iterator[torch.Tensor]:
    """Batches of images `(B, C, H, W)` in [-1, 1] to measure on."""
    factor, data = FirstStage(vae).downsample_factor, options.data
    resolution = data.resolution or training_resolution(options.first_stage, vae)
    if resolution is None:
        raise ConfigError(
            "data.resolution is missing, and the first stage does not say what it was trained on"
        )
    if resolution % factor:
        raise ConfigError(
            f"data.resolution is {resolution}; it must be a multiple of the downsample factor "
            f"{factor}"
        )
    view, reading = data.view(resolution), data.reading(vae.config.in_channels)
    found = fixed_images(data.open("train", say=print), view, reading, data.images, seed=0)
    for pixels in found.pixels.split(_AT_ONCE):
        yield images_from_pixels(pixels)


def card(options: Options, vae: Any, mean: list[float], std: list[float]) -> str:
    """The folder's README."""
    name = type(vae).__name__
    rows = "\n".join(
        f"| {channel} | {m:.6f} | {s:.6f} |"
        for channel, (m, s) in enumerate(zip(mean, std, strict=True))
    )
    folded = ("statistics", "(z there - mean) / std")
    if options.whiten:
        folded = ("covariance", "W (z there - mean), with a matrix W and channels that are not "
                  "correlated")  # fmt: skip
    return f"""---
library_name: diffusers
tags: [autoencoder, latent-diffusion, first-stage]
---

# First stage with standard latents

`{public_name(options.first_stage)}` with the {folded[0]} of its latents folded into the 1x1
convolutions around them. Reconstructions are the same; every latent channel has mean 0 and variance
1 over the images measured, `scaling_factor` is 1 and there is no shift to forget. Latents of the
two are not interchangeable: z here is {folded[1]}.

```python
from diffusers import {name}
vae = {name}.from_pretrained("this-folder")
latents = vae.encode(images).{FirstStage(vae).family.encoded_as}
```

| channel | mean | std |
|---|---|---|
{rows}
"""


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    options = read_options(Options, arguments, switches=_SWITCHES)
    for name in ("first_stage", "output"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing: see --help")
    if options.fold_statistics == options.whiten:
        raise ConfigError(
            "--fold_statistics and --whiten are two ways: choose one"
            if options.whiten
            else "nothing to do: add --fold_statistics or --whiten"
        )
    return options
