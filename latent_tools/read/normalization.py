"""How latents become what a diffusion model sees: (z - offset) * scale, per channel."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest, pipeline_statistics

Sampling = Literal["posterior", "mean", "raw", "tokens"]
Normalization = Literal["scale_shift", "channel", "none"]


def normalization(
    manifest: Manifest, normalize: Normalization, sample: Sampling, path: Path
) -> tuple[Tensor, Tensor]:
    """Offset and scale of a cache's latents.

    Args:
        manifest: The cache's.
        normalize: `scale_shift`, `channel` or `none`; see `LatentDataset`.
        sample: `mean` has the spread of the posteriors' means alone.
        path: The cache, for messages.

    Returns:
        `(C, 1, 1)` float32 each.

    Raises:
        CacheError: When the cache has no samples to normalize by, or its first stage normalizes in
            a way that is not one number per channel.
    """
    if manifest.holds_tokens:  # numbers of codes, which nothing scales
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    channels = manifest.first_stage["latent_channels"]
    if normalize == "none":
        offset, scale = torch.zeros(channels), torch.ones(channels)
    elif normalize == "channel":
        offset, scale = _of_this_cache(manifest, sample, path)
    else:
        offset, scale = _of_pipelines(manifest.first_stage, channels, path)
    return offset[:, None, None], scale[:, None, None]


def _of_this_cache(manifest: Manifest, sample: Sampling, path: Path) -> tuple[Tensor, Tensor]:
    statistics = manifest.statistics
    if not statistics:
        raise CacheError(f"{str(path)!r} has no samples to normalize by")
    # Draws have the means' spread and the posteriors' own; means have the first alone.
    is_mean = sample == "mean" and manifest.representation == "moments"
    std = torch.tensor(statistics["mean_std" if is_mean else "std"])
    scale = 1.0 / torch.where(std > 0, std, torch.ones_like(std))
    return torch.tensor(statistics["mean"]), scale


def _of_pipelines(stage: dict[str, Any], channels: int, path: Path) -> tuple[Tensor, Tensor]:
    """What diffusers' pipelines apply: SDXL's rule where there are lists, else scaling and shift.

    `StableDiffusionXLPipeline` decodes z * latents_std / scaling_factor + latents_mean, and so do
    the pipelines of Wan, Qwen-Image and LTX, whose scaling factor is 1 or absent.
    """
    advice = "use normalize='channel', and `denormalize` before decoding"
    if stage.get("batch_norm"):
        raise CacheError(
            f"normalize is 'scale_shift', but the first stage of {str(path)!r} "
            f"({stage['class']}) normalizes patches of latents by a batch norm: {advice}"
        )
    scaling, shift = stage["scaling_factor"], stage["shift_factor"]
    mean, std = stage.get("latents_mean"), stage.get("latents_std")
    if mean is None or std is None:
        return torch.full((channels,), shift), torch.full((channels,), scaling)
    if shift != 0:
        raise CacheError(
            f"normalize is 'scale_shift', but the first stage of {str(path)!r} has latents_mean "
            f"and a shift_factor ({shift}), which no pipeline applies together: {advice}"
        )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise CacheError(
            f"normalize is 'scale_shift', but latents_mean and latents_std of the first stage of "
            f"{str(path)!r} are not {channels} numbers, the latter positive: {advice}"
        )
    return torch.tensor(mean), scaling / torch.tensor(std)


def check_statistics(manifest: Manifest, autoencoder: nn.Module, path: Path) -> None:
    """Refuse a first stage that pipelines normalize otherwise than this cache does.

    Raises:
        CacheError: Naming the entry with both values.
    """
    # Reading latents needs no diffusers, whose import takes seconds in every worker.
    from first_stage.models.first_stage import as_first_stage

    now = pipeline_statistics(as_first_stage(autoencoder, "expect"))
    for name, value in now.items():
        recorded = manifest.first_stage.get(name, False if name == "batch_norm" else None)
        if recorded != value:
            raise CacheError(
                f"the first stage's {name} is {value}, and {str(path)!r} was made when it was "
                f"{recorded}, by which normalize='scale_shift' goes: use the first stage as it "
                "was, or normalize='channel' or 'none', which do not depend on it"
            )
