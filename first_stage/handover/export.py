"""The export: a plain diffusers folder with the statistics of its latents."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from first_stage.files import write_folder, write_json
from first_stage.handover.reload import check_reload
from first_stage.handover.statistics import LatentStatistics
from first_stage.models.first_stage import FirstStage, as_first_stage
from first_stage.models.loading import STATISTICS_FILE

_TILE = 512
"""Least side in pixels of the tiles that diffusers cuts large images into, where it is asked to."""


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

    Raises:
        UserError: When the folder, loaded by diffusers, does not give back what was trained.
    """
    first_stage = as_first_stage(first_stage)
    scaling, shift = kept or statistics.scaling_and_shift
    model = first_stage.model
    first_stage.bottleneck.bake(model)
    carrier = first_stage.family.carrier
    if kept is None and carrier.channels_in is not None:
        carrier.write_channels(model, statistics.mean, statistics.std)
    else:
        carrier.write(model, scaling, shift)
    if "force_upcast" in model.config:
        model.register_to_config(force_upcast=needs_float32(model, statistics))
    if "sample_size" in model.config:
        # As large as a training crop, diffusers' tiles would show as a grid (`enable_tiling`).
        factor = first_stage.downsample_factor
        tile = max(_TILE, model.config["sample_size"] or 0)
        model.register_to_config(sample_size=-(-tile // factor) * factor)
    if kept is None and carrier.channels_in is None and "latents_mean" in model.config:
        # Only Stable Diffusion XL's pipeline reads these, multiplies by them on top of the scaling
        # factor, and breaks where there are not four channels. They are in a file of their own.
        model.register_to_config(latents_mean=None, latents_std=None)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, safe_serialization=True)
        check_reload(first_stage, temporary)
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
