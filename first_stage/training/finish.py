"""What a finished run leaves behind: the export with its card, and the report."""

from pathlib import Path

from first_stage.config.schema import Config
from first_stage.evaluation import Evaluation, save
from first_stage.evaluation.grids import save_gif
from first_stage.handover.card import model_card
from first_stage.handover.export import needs_float32, write_export
from first_stage.handover.public import public_config, public_name
from first_stage.handover.statistics import LatentStatistics
from first_stage.models.first_stage import FirstStage
from first_stage.report import write_report
from first_stage.training import run_folder as files
from first_stage.training.resume import recipe
from first_stage.training.start_from import Lineage


def hand_over(
    config: Config,
    lineage: Lineage,
    first_stage: FirstStage,
    statistics: LatentStatistics,
    metrics: dict[str, float],
    found: Evaluation,
    cell: int,
) -> None:
    """Write the export and the report of a run.

    Args:
        config: The run's configuration.
        lineage: Where its weights came from.
        first_stage: With the averaged weights.
        statistics: Of their latents.
        metrics: Of the held-out images, for the card.
        found: What a closer look at some images found, for the report.
        cell: Side of one image in the pictures of the run, in pixels.
    """
    folder = Path(config.output_dir)
    frames = files.list_frames(folder)
    picture = frames[-1][1]
    save_gif([(f"step {step}", file) for step, file in frames], cell, folder / files.GIF)
    kept = None
    if lineage.keeps_latents:
        kept = first_stage.scaling_and_shift
    card = model_card(
        first_stage,
        statistics,
        data=public_name(config.data.path),
        recipe=recipe(public_config(config)),
        metrics=metrics,
        steps=config.train.max_steps,
        images_seen=config.train.max_steps * config.train.batch_size,
        picture="reconstructions.png",
        kept=kept,
        started_from=lineage.started_from,
        force_upcast=needs_float32(first_stage.model, statistics),
    )
    extras: dict[str, str | Path] = {"README.md": card, "reconstructions.png": picture}
    write_export(first_stage, statistics, folder / files.EXPORT, extras, kept)
    save(found, folder / files.EVALUATION)
    write_report(folder)
