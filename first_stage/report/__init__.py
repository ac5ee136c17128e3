"""The report of a training run or an evaluation: one HTML file that needs nothing else.

It is made from the files of the folder it describes, as far as they are there: a run's
`config.yaml`, `log.jsonl`, `training.gif` and `pictures/`, and an evaluation's `metrics.json` and
`pairs/` (in the folder itself or in its subfolder `evaluation/`).
"""

from pathlib import Path

from first_stage.errors import UserError
from first_stage.evaluation.files import is_evaluation, load
from first_stage.files import write_text
from first_stage.report.artifacts import artifacts_section
from first_stage.report.change import change_section
from first_stage.report.codes import codes_section
from first_stage.report.comparison import comparison_section, per_image_section, summary_section
from first_stage.report.latents import latents_section
from first_stage.report.page import Section, page
from first_stage.report.pairs import pairs_section
from first_stage.report.spectra import spectra_section
from first_stage.report.training import read_run, recipe_section, training_section

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
"""Name of the report in its folder."""


def write_report(folder: str | Path) -> Path:
    """Make the report of a folder.

    Args:
        folder: A training run's or an evaluation's. What is not there is left out.

    Returns:
        The report's path: `report.html` in the folder.

    Raises:
        UserError: When the folder holds neither, or a file in it is damaged.
    """
    folder = Path(folder)
    run = read_run(folder)
    measured = next((f for f in (folder, folder / "evaluation") if is_evaluation(f)), None)
    if run is None and measured is None:
        raise UserError(
            f"{str(folder)!r} holds neither a training run (log.jsonl) nor an evaluation "
            "(metrics.json): there is nothing to report"
        )
    name = folder.resolve().name
    sections: list[Section | None] = []
    if measured is not None:
        content, pairs = load(measured)
        stages, protocol = content["first_stages"], content["protocol"]
        change = content.get("change")
        sections += [
            summary_section(stages, protocol, folder if run else None),
            change_section(stages, change),
            None if change is None else pairs_section(stages, pairs, measured, change),
            comparison_section(stages),
            pairs_section(stages, pairs, measured) if change is None else None,
            training_section(run) if run else None,
            spectra_section(stages),
            latents_section(stages, pairs, measured),
            codes_section(stages, pairs, measured),
            artifacts_section(stages, measured),
            per_image_section(stages),
        ]
    elif run is not None:
        sections.append(training_section(run))
    if run is not None:
        sections.append(recipe_section(run))
    kind = "Training run" if run else "Evaluation"
    write_text(folder / REPORT, page(f"{kind}: {name}", [s for s in sections if s]))
    return folder / REPORT
