"""The export: a plain diffusers folder, with the latents' statistics measured on training data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from first_stage.distributed.processes import Processes
from first_stage.files import write_folder, write_json
from first_stage.metrics.moments import ChannelMoments, merged
from first_stage.models.first_stage import FirstStage, as_first_stage
from first_stage.models.loading import STATISTICS_FILE

_TILE = 512
"""Least side in pixels of the tiles that diffusers cuts large images into, where it is asked to."""
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


def write_export(
    first_stage: FirstStage | Any,
    statistics: LatentStatistics,
    folder: Path,
    extras: dict[str, str | Path],
    kept: tuple[float, float] | None = None,
) -> None:
    """Write a folder that stock diffusers loads, with the measured statistics.

    Args:
        first_stage: What to hand over, or a loaded diffusers autoencoder. Its model's config
            takes up scaling and shift.
        statistics: From `measure_latents`.
        folder: The folder; one that is there is replaced.
        extras: More files by name: their text, or a file to copy.
        kept: Scaling and shift of the first stage whose encoder it kept, on which a diffusion model
            counts; `None`: as measured.
    """
    first_stage = as_first_stage(first_stage)
    scaling, shift = kept or statistics.scaling_and_shift
    model = first_stage.model
    first_stage.family.carrier.write(model, scaling, shift)
    if "force_upcast" in model.config:
        model.register_to_config(force_upcast=needs_float32(model, statistics))
    if "sample_size" in model.config:
        # As large as a training crop, diffusers' tiles would show as a grid (`enable_tiling`).
        factor = first_stage.downsample_factor
        tile = max(_TILE, model.config["sample_size"] or 0)
        model.register_to_config(sample_size=-(-tile // factor) * factor)
    if kept is None and "latents_mean" in model.config:
        # Only Stable Diffusion XL's pipeline reads these, multiplies by them on top of the scaling
        # factor, and breaks where there are not four channels. They are in a file of their own.
        model.register_to_config(latents_mean=None, latents_std=None)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / STATISTICS_FILE, asdict(statistics))
        for name, content in extras.items():
            if isinstance(content, Path):
                (temporary / name).write_bytes(content.read_bytes())
            else:
                (temporary / name).write_text(content, encoding="utf-8")

    write_folder(folder, write)


def needs_float32(model: Any, statistics: LatentStatistics) -> bool:
    """`force_upcast`: once a first stage was found to need it, small crops are no proof against."""
    return statistics.needs_float32 or bool(model.config.get("force_upcast", False))


def load_snippet(folder: str) -> str:
    """The lines of Python that load an export with diffusers alone."""
    return (
        "from diffusers import AutoencoderKL\n"
        f'vae = AutoencoderKL.from_pretrained("{folder}")\n'
        "latents = (vae.encode(images).latent_dist.sample() - vae.config.shift_factor)"
        " * vae.config.scaling_factor"
    )


def model_card(
    statistics: LatentStatistics,
    data: str,
    recipe: str,
    metrics: dict[str, float],
    steps: int,
    images_seen: int,
    downsample_factor: int,
    picture: str | None,
    kept: tuple[float, float] | None = None,
    force_upcast: bool | None = None,
) -> str:
    """The export's README: what it is, how to load it, how good it is, what made it.

    Args:
        statistics: Of the latents.
        data: What it was trained on, as the user named it.
        recipe: The configuration as YAML.
        metrics: Name to value, on held-out images.
        steps: Updates of the autoencoder.
        images_seen: Images it was trained on, repeats counted.
        downsample_factor: Pixels per latent along a side.
        picture: File name of the grid beside the README.
        kept: Scaling and shift of the first stage whose encoder it kept; `None`: as measured.
        force_upcast: What the config says; `None`: as measured.

    Returns:
        Markdown.
    """
    scaling, shift = kept or statistics.scaling_and_shift
    ranges = "\n".join(
        f"| {channel} | {mean:.4f} | {std:.4f} |"
        for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True))
    )
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    if kept is None:
        origin = (
            f"`scaling_factor` {scaling:.6f} is one over the standard deviation of the\nlatents of "
            f"{statistics.images:,} training images, `shift_factor` {shift:.6f} their mean."
        )
    else:
        origin = (
            "Only the decoder was trained: latents are those of the first\nstage it was made from, "
            f"and so are `scaling_factor` {scaling:.6f} and `shift_factor` {shift:.6f}."
        )
    upcast = statistics.needs_float32 if force_upcast is None else force_upcast
    shown = f"\n![Originals above, reconstructions below]({picture})\n" if picture else ""
    return f"""---
library_name: diffusers
tags: [autoencoder, latent-diffusion, first-stage]
---

# First stage f{downsample_factor}, {len(statistics.mean)} latent channels

An `AutoencoderKL` trained on `{data}` for {steps:,} steps ({images_seen:,} images, repeats
counted) with a patch critic and the perceptual distance that the critic learned.
{shown}
## Use

```python
{load_snippet("this-folder")}
images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
```

Images are in [-1, 1]. {origin}

**Pipelines that ignore `shift_factor`**: `StableDiffusionPipeline` (1.x, 2.x),
`StableDiffusionXLPipeline` and `DiTPipeline` use `scaling_factor` only, so their diffusion model
works on latents that lie {shift * scaling:.4f} higher. `StableDiffusion3Pipeline` and
`FluxPipeline` use both. Train by the rule of the pipeline that will decode, or fold the statistics
into the weights (`first-stage export --fold_statistics`), after which every pipeline is right.

Per channel (also in `latent_statistics.json`):

| channel | mean | std |
|---|---|---|
{ranges}

`force_upcast` is {str(upcast).lower()}: the largest activation measured was
{statistics.largest_activation:.1f}, and float16 ends at 65,504.

## Held-out images

| metric | value |
|---|---|
{table}

## Recipe

```yaml
{recipe.rstrip()}
```
"""
