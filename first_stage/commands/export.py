"""The command `first-stage export`: a first stage in the file or folder that a program needs."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import VQModel

from first_stage.command_line import command_line
from first_stage.config.images import ImagesConfig
from first_stage.config.parsing import read_options
from first_stage.config.types import PositiveFloat, PositiveInt
from first_stage.data import fixed_images, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError
from first_stage.files import write_folder, write_json, write_text
from first_stage.handover.folding import common_deviation, fold_statistics
from first_stage.handover.public import public_name
from first_stage.handover.single_file import programs, put_into, write_single_file
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
    """Write a first stage anew: as the file that a program reads, or with standard latents."""

    first_stage: str = ""
    """A diffusers folder, a pipeline's folder, a single file or whole checkpoint, or a hub id."""
    output: str = ""
    """The folder to write, or the file; it must not be there yet."""
    layout: Literal["diffusers", "ldm"] = "diffusers"
    """diffusers: a folder. ldm: one .safetensors with latent diffusion's names, for the programs
    people draw with; the output and the card say for which."""
    half: Literal["fp16", "bf16"] | None = None
    """Write weights in half precision, and say what that changes; null: float32."""
    into: str | None = None
    """Write a copy of this whole checkpoint (.safetensors) in which the first stage is this one;
    every other byte stays, and so do the types of the weights."""
    scaling_factor: PositiveFloat | None = None
    """What pipelines multiply the latents by, where the file does not say; null: as it says."""
    shift_factor: float | None = None
    """What they subtract before; null: as it says."""
    fold_statistics: bool = False
    """Fold the per-channel mean and standard deviation of the latents into the 1x1 convolutions:
    the same reconstructions, latents with mean 0 and variance 1, scaling_factor 1, no shift."""
    whiten: bool = False
    """Instead, fold the whole covariance of the latents into them: channels that do not repeat each
    other, the most signal first. Measured on images or a cache; each channel's posterior noise
    becomes its average."""
    latents: str | None = None
    """For these two: take the statistics of this cache, which the first stage made."""
    data: ExportData = field(default_factory=ExportData)
    """For these two: or measure them on these images."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Change what is to be changed, write, and say what came of it.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options = parse_options(arguments)
    if Path(options.output).exists():
        raise ConfigError(f"output {options.output!r} is already there: give another")
    vae = load_autoencoder(options.first_stage, field="--first_stage")
    if options.scaling_factor is not None or options.shift_factor is not None:
        _set_scale(vae, options.scaling_factor, options.shift_factor)
    standing_card, known = _plain_card(options, vae), _statistics_file(options)
    if options.fold_statistics or options.whiten:
        vae, standing_card, known = _folded(options, vae)
    if options.half is not None:
        rounded = in_half(copy.deepcopy(vae), options.half)
        print(f"half      {half_difference(options, vae, rounded)}")
        vae = rounded
    if options.into is not None:
        count, types = put_into(vae, Path(options.into), Path(options.output))
        print(
            f"export    {options.output}: a copy of {options.into} with {count:,} tensors replaced "
            f"({types}), every other byte as it was"
        )
        return
    if options.layout == "ldm":
        write_single_file(vae, Path(options.output))
        card_file = Path(options.output).with_suffix(".md")
        write_text(card_file, standing_card)
        print(f"export    {options.output}, card {card_file}\nread by   {programs(vae)}")
        return
    _write_folder(options, vae, standing_card, known)


def _write_folder(options: Options, vae: Any, text: str, known: dict[str, Any] | None) -> None:
    """The diffusers folder, and what comes next."""

    def write(folder: Path) -> None:
        vae.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if known is not None:
            write_json(folder / STATISTICS_FILE, known)

    write_folder(Path(options.output), write)
    name = type(vae).__name__
    scaling, shift = FirstStage(vae).scaling_and_shift
    shown = "no shift" if shift == 0 else f"shift_factor {shift:g}"
    print(
        f"export    {options.output} (scaling_factor {scaling:g}, {shown})\n"
        "Load it with diffusers:\n"
        f"  from diffusers import {name}\n"
        f"  vae = {name}.from_pretrained({options.output!r})"
    )
    if options.fold_statistics or options.whiten:
        cache = ("--first_stage", options.output, "--data.path", "DATA", "--output", "CACHE")
        print(
            "Latents cached with the first stage as it was belong to that one; cache anew:\n"
            f"  {command_line('cache', *cache, processes=1)}"
        )


def _set_scale(vae: Any, scaling: float | None, shift: float | None) -> None:
    carrier = FirstStage(vae).family.carrier
    known = carrier.read(vae)
    if shift and not carrier.carries_shift:
        raise ConfigError(
            f"shift_factor is {shift}, but the config of {type(vae).__name__} has no place for one"
        )
    carrier.write(
        vae, known[0] if scaling is None else scaling, known[1] if shift is None else shift
    )


def _folded(options: Options, vae: Any) -> tuple[Any, str, dict[str, Any]]:
    """The first stage with standard latents, its card, and its statistics."""
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
    standard: dict[str, Any] = {"mean": [0.0] * len(mean), "std": [1.0] * len(std)}
    standard["resolution"] = training_resolution(options.first_stage, vae)
    return folded, card(options, vae, mean, std), standard


def _statistics_file(options: Options) -> dict[str, Any] | None:
    """What was measured of the first stage's latents, which stay as they are."""
    file = Path(options.first_stage) / STATISTICS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def in_half(vae: Any, kind: Literal["fp16", "bf16"]) -> Any:
    """A first stage with rounded weights.

    Raises:
        ConfigError: When one of them overflows.
    """
    rounded = vae.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    for name, value in rounded.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ConfigError(
                f"half is {kind}, but {name} does not fit into it: its range ends at 65,504. Use "
                "bf16, or keep float32"
            )
    return rounded


@torch.no_grad()
def half_difference(options: Options, vae: Any, rounded: Any) -> str:
    """What rounding the weights changes on images, or on smooth random ones, in float32.

    Args:
        options: With the images, where some are named.
        vae: The first stage as it was.
        rounded: The same, with rounded weights.
    """
    stage = FirstStage(vae)
    factor = stage.downsample_factor
    if options.data.path is not None:
        shown, where = next(images(options, stage.model)), "images"
    else:
        draw = torch.Generator().manual_seed(0)
        coarse = torch.rand(2, stage.in_channels, 5, 5, generator=draw) * 2 - 1
        size = (8 * factor, 8 * factor)
        shown = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
        where = "smooth random images (name some with --data.path)"
    latents = stage.encode(shown).latents
    before = stage.decode(latents)
    other = FirstStage(copy.deepcopy(rounded).float())
    moved = (other.encode(shown).latents - latents).square().mean().sqrt() / latents.std()
    error = (other.decode(latents) - before).square().mean().clamp_min(1e-20) / 4
    return (
        f"{options.half}: on {len(shown)} {where}, computed in float32, latents move by "
        f"{float(moved):.1e} of their standard deviation, and the same latents decode to images "
        f"{float(-10 * error.log10()):.1f} dB from before"
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


def _plain_card(options: Options, vae: Any) -> str:
    """The card of a first stage that is only written anew."""
    stage = FirstStage(vae)
    scaling, shift = stage.scaling_and_shift
    return f"""# First stage f{stage.downsample_factor}, {stage.latent_channels} latent channels

`{public_name(options.first_stage)}`, a `{type(vae).__name__}`, written anew; its weights are
{f"rounded to {options.half}" if options.half else "float32"}. `scaling_factor` is {scaling:g},
`shift_factor` {shift:g}.

As one file in latent diffusion's layout it is read by: {programs(vae)}.
As a folder it is read by diffusers (`{type(vae).__name__}.from_pretrained`).
"""


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
    if options.fold_statistics and options.whiten:
        raise ConfigError("--fold_statistics and --whiten are two ways: choose one")
    if options.into is not None and options.half is not None:
        raise ConfigError("half and into are both given: a checkpoint's weights keep their types")
    if (options.layout == "ldm" or options.into) and not options.output.endswith(".safetensors"):
        raise ConfigError(
            f"output is {options.output!r}: give the name of a file that ends in .safetensors"
        )
    return options
