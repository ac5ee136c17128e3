"""The export's card: what it is, how to load it, how good it is, what made it."""

import json
from collections.abc import Mapping
from typing import Any

from first_stage.handover.statistics import LatentStatistics
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, as_first_stage
from first_stage.models.padding import FIELD, padding_of, stock_lines


def load_lines(config: Mapping[str, Any], folder: str) -> list[str]:
    """The lines of Python with which diffusers alone loads an export as it was trained.

    Args:
        config: What its `config.json` says.
        folder: Where it lies, as the lines are to name it.
    """
    name = config["_class_name"]
    fixed = stock_lines(config.get(FIELD, "zeros"))
    return [
        *["import torch"][: len(fixed)],
        f"from diffusers import {name}",
        f"vae = {name}.from_pretrained({json.dumps(folder)})",
        *fixed,
    ]


def load_lines_of(model: Any, folder: str) -> list[str]:
    """The same for a loaded model, whose export will lie there."""
    return load_lines({**model.config, "_class_name": type(model).__name__}, folder)


def load_snippet(first_stage: FirstStage, folder: str) -> str:
    """The lines of Python that load an export with diffusers alone, and encode and decode."""
    family, model = first_stage.family, first_stage.model
    lines = [
        *load_lines_of(model, folder),
        *family.carrier.usage(f"vae.encode({family.images_as}).{family.encoded_as}"),
    ]
    if isinstance(first_stage.bottleneck, Discrete):
        lines += [
            "tokens = vae.quantize(vae.encode(images).latents)[2][2].view(len(images), h, w)",
            "images = vae.decode(vae.quantize.embedding(tokens).movedim(3, 1)).sample",
        ]
    return "\n".join(lines)


def model_card(
    first_stage: FirstStage | Any,
    statistics: LatentStatistics,
    data: str,
    recipe: str,
    metrics: dict[str, float],
    steps: int,
    images_seen: int,
    picture: str | None,
    kept: tuple[float, float] | None = None,
    force_upcast: bool | None = None,
    started_from: Mapping[str, Any] | None = None,
) -> str:
    """The export's README: what it is, how to load it, how good it is, what made it.

    Args:
        first_stage: What is handed over, or a loaded diffusers autoencoder.
        statistics: Of the latents.
        data: What it was trained on, as the user named it.
        recipe: The configuration as YAML.
        metrics: Name to value, on held-out images.
        steps: Updates of the autoencoder.
        images_seen: Images it was trained on, repeats counted.
        picture: File name of the grid beside the README.
        kept: Scaling and shift of the first stage whose encoder it kept; `None`: as measured.
        force_upcast: What the config says; `None`: as measured.
        started_from: `step` and `sha256` of the checkpoint that it began from, if any.

    Returns:
        Markdown.
    """
    stage = as_first_stage(first_stage)
    ranges = "\n".join(
        f"| {channel} | {mean:.4f} | {std:.4f} |"
        for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True))
    )
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    shown = f"\n![Originals above, reconstructions below]({picture})\n" if picture else ""
    name = type(stage.model).__name__
    article = "An" if name.startswith("A") else "A"
    began = _began(started_from)
    return f"""---
library_name: diffusers
tags: [autoencoder, latent-diffusion, first-stage]
---

# First stage f{stage.downsample_factor}, {len(statistics.mean)} latent channels

{article} `{name}` trained on `{data}` for {steps:,} steps ({images_seen:,} images, repeats
counted) with a patch critic and the perceptual distance that the critic learned.{began}
{shown}
## Use

```python
{load_snippet(stage, "this-folder")}
```

Images are in [-1, 1]. {padding_remark(stage.model)}{_origin(stage, statistics, kept)}
{_codes(stage, metrics)}
Per channel (also in `latent_statistics.json`):

| channel | mean | std |
|---|---|---|
{ranges}
{_upcast(stage, statistics, force_upcast)}
## Held-out images

| metric | value |
|---|---|
{table}

## Recipe

```yaml
{recipe.rstrip()}
```
"""


def padding_remark(model: Any) -> str:
    """Who decodes with zeros what was trained with reflection; empty where nobody does."""
    if padding_of(model) == "zeros":
        return ""
    return """**The decoder pads by reflection**, for which diffusers has no field. Without the two
lines that set `padding_mode`, stock diffusers and every other program decode with zeros, which
costs quality, most of all at the border. `first-stage` itself reads `decoder_padding` in
`config.json` and needs no such lines.

"""


def _began(started_from: Mapping[str, Any] | None) -> str:
    """The run whose checkpoint was the beginning."""
    if started_from is None:
        return ""
    return (
        f" It began from\nstep {started_from['step']:,} of another run (checkpoint "
        f"`{started_from['sha256'][:16]}`), with its average, critic and optimizers."
    )


def _origin(
    stage: FirstStage, statistics: LatentStatistics, kept: tuple[float, float] | None
) -> str:
    """Where scaling and shift come from, and which pipelines ignore a shift."""
    scaling, shift = kept or statistics.scaling_and_shift
    if (place := stage.family.carrier.channels_in) is not None:
        if kept is None:
            return (
                f"Mean and standard deviation of each latent channel, over\n{statistics.images:,} "
                f"training images, are in {place},\nwhere its pipelines look for them.\n"
            )
        return (
            "Only the decoder was trained: latents are those of the first\nstage it was made from, "
            f"and so is what {place} say.\n"
        )
    if not stage.family.carrier.carries_shift:
        return (
            f"`scaling_factor` {scaling:.6f} is one over the standard deviation of the\nlatents of "
            f"{statistics.images:,} training images. Their mean is {shift:.6f}, for which the "
            f"config of\n`{type(stage.model).__name__}` has no place: pipelines do not subtract it."
            "\n"
        )
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
    return f"""{origin}

**Pipelines that ignore `shift_factor`**: `StableDiffusionPipeline` (1.x, 2.x),
`StableDiffusionXLPipeline` and `DiTPipeline` use `scaling_factor` only, so their diffusion model
works on latents that lie {shift * scaling:.4f} higher. `StableDiffusion3Pipeline` and
`FluxPipeline` use both. Train by the rule of the pipeline that will decode, or fold the statistics
into the weights (`first-stage export --fold_statistics`), after which every pipeline is right.
"""


def _codes(stage: FirstStage, metrics: dict[str, float]) -> str:
    """What a discrete first stage's codes are, and how they are used."""
    if not isinstance(stage.bottleneck, Discrete):
        return ""
    count, dimensions = stage.bottleneck.table().shape
    text = (
        f"\n## Codes\n\n{count:,} codes of {dimensions} dimensions. `encode` gives latents before "
        "they are quantized, which a diffusion\nmodel trains on; `decode` quantizes."
    )
    if "codes_used" in metrics:
        text += (
            f" On the held-out images {metrics['codes_used']:.1%} of the codes are\nused "
            f"({round((1 - metrics['codes_used']) * count):,} codes are not used), as many as "
            f"{metrics['codes_perplexity']:,.0f} equally frequent ones would be (perplexity); "
            f"the most\nfrequent one has {metrics['codes_most_frequent']:.1%} of the tokens."
        )
    return text + "\n"


def _upcast(stage: FirstStage, statistics: LatentStatistics, force_upcast: bool | None) -> str:
    if "force_upcast" not in stage.model.config:
        return ""
    upcast = statistics.needs_float32 if force_upcast is None else force_upcast
    return f"""
`force_upcast` is {str(upcast).lower()}: the largest activation measured was
{statistics.largest_activation:.1f}, and float16 ends at 65,504.
"""
