"""The comparison's table and figure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from experiments.objectives.experiment import Photos, Result
from experiments.objectives.measures import Scores
from first_stage.evaluation.grids import grid
from first_stage.models.first_stage import FirstStage, reconstruct
from first_stage.models.loading import load_autoencoder

Results = Mapping[str, Sequence[Result]]
"""Results of the seeds, by row."""

_COLUMNS: list[tuple[str, str, Callable[[Scores], float]]] = [
    ("PSNR (dB)", ".2f", lambda s: s.psnr),
    ("local Frechet distance", ".1f", lambda s: s.local_frechet),
    ("high frequencies kept", ".3f", lambda s: s.high_frequencies),
    ("feature distance", ".2f", lambda s: s.feature_distance),
]


_SHOWN_SIDE = 144
"""About how large a tile is shown, in pixels."""


def table(results: Results) -> str:
    """A Markdown table: mean over the seeds, and from the least to the greatest."""
    seeds = max(len(found) for found in results.values())
    header = ["objective", *(name for name, _, _ in _COLUMNS)]
    lines = [line(header), line(["---"] + ["---:"] * len(_COLUMNS))]
    lines.append(line(["original", "", f"{0:.1f}", f"{1:.3f}", f"{0:.2f}"]))
    for row, found in results.items():
        cells = [row if len(found) == seeds else f"{row} ({_seeds(len(found))})"]
        for _, form, value in _COLUMNS:
            numbers = [value(result.scores) for result in found]
            cells.append(cell(numbers, form))
        lines.append(line(cells))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cell(numbers: Sequence[float], form: str) -> str:
    """The mean of the seeds, and from the least to the greatest where there are several."""
    mean = f"{statistics.fmean(numbers):{form}}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ({min(numbers):{form}} to {max(numbers):{form}})"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def verdicts(results: Results, row: str = "learned+hinge", baseline: str = "mse") -> list[str]:
    """Whether a row is better than another by more than seeds differ, in words.

    Of one seed both rows have the same start and the same photos in the same order, so each is held
    against its own: the mean of these ratios has to clear the bar by more than their standard
    deviation. What any two seeds give is said beside it.

    Args:
        results: By row; nothing is said when one of the two is missing.
        row: The row.
        baseline: What it is compared with.
    """
    if row not in results or baseline not in results:
        return []
    ours, theirs = ([r.scores for r in results[name]] for name in (row, baseline))
    frechet = _Ratios.of(ours, theirs, lambda s: s.local_frechet)
    detail = _Ratios.of(ours, theirs, lambda s: s.high_frequencies)
    feature = _Ratios.of(ours, theirs, lambda s: s.feature_distance)
    most = max(a.high_frequencies for a in ours)
    return [
        _verdict(
            frechet.are_below(0.5),
            f"{frechet} of {baseline}'s local Frechet distance, wanted: at most 0.5",
        ),
        _verdict(
            detail.are_above(3.0) and most <= 1,
            f"at most {most:.3f} of the original's high frequencies, {detail} times {baseline}'s, "
            "wanted: at least 3",
        ),
        _verdict(
            feature.are_below(1.0),
            f"{feature} of {baseline}'s feature distance, wanted: at most 1",
        ),
    ]


@dataclass(frozen=True)
class _Ratios:
    """A score of one row by that of another.

    Attributes:
        own: Of the same seed.
        any_two: Of any two seeds.
    """

    own: list[float]
    any_two: list[float]

    @classmethod
    def of(
        cls, ours: Sequence[Scores], theirs: Sequence[Scores], value: Callable[[Scores], float]
    ) -> "_Ratios":
        """Of one score, by seed in the same order."""
        own = [value(a) / value(b) for a, b in zip(ours, theirs, strict=True)]
        return cls(own, [value(a) / value(b) for a in ours for b in theirs])

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 of a single one, which says nothing of it."""
        return statistics.stdev(self.own) if len(self.own) > 1 else 0.0

    def are_below(self, bar: float) -> bool:
        """Whether the mean is, by more than the spread."""
        return statistics.fmean(self.own) + self.spread <= bar

    def are_above(self, bar: float) -> bool:
        """Whether the mean is, by more than the spread."""
        return statistics.fmean(self.own) - self.spread >= bar

    def __str__(self) -> str:
        if len(self.own) == 1:
            return f"{self.own[0]:.3f} (one seed)"
        return (
            f"{statistics.fmean(self.own):.3f} +- {self.spread:.3f} ({min(self.own):.3f} to "
            f"{max(self.own):.3f}; any two seeds: {min(self.any_two):.3f} to "
            f"{max(self.any_two):.3f})"
        )


def _verdict(met: bool, text: str) -> str:
    return f"{'met' if met else 'NOT MET'}: {text}"


def stripes_table(results: Results, others: Mapping[str, float]) -> str:
    """The stripes experiment as a Markdown table.

    Args:
        results: By row; those whose critic learned a distance are listed, averaged over seeds.
        others: Ratios of other distances, by name.
    """
    lines = [
        line(["distance", "d(stripes, shifted) / d(stripes, gray)"]),
        line(["---", "---:"]),
        *(line([name, f"{ratio:.2f}"]) for name, ratio in others.items()),
    ]
    for row, found in results.items():
        measured = [result.stripes for result in found if result.stripes]
        if not measured:
            continue
        for prefix, words in (("untrained ", "before training"), ("", "trained")):
            names = [n for n in measured[0] if n.startswith("untrained") == bool(prefix)]
            means = {
                n.removeprefix(prefix): statistics.fmean(one[n] for one in measured) for n in names
            }
            layers = ", ".join(f"{v:.2f}" for n, v in means.items() if n != "all")
            lines.append(
                line([f"critic of {row}, {words}", f"{means['all']:.2f} (layers: {layers})"])
            )
    return "\n".join(lines)


@torch.no_grad()
def figure(folders: Mapping[str, Path], photos: Photos, columns: int = 8) -> Image.Image:
    """Held-out photos over their reconstructions, a row for each objective.

    Args:
        folders: The trained first stages, by row.
        photos: The held-out photos; the middle tile of each of the first `columns` is shown.
        columns: How many.

    Returns:
        The picture; small tiles are enlarged by repeating their pixels, not smoothed.
    """
    shown = photos.held_out[_middle_tiles(photos.names, columns)]
    rows: dict[str, Tensor] = {"original": shown}
    for row, folder in folders.items():
        rows[row] = reconstruct(FirstStage(load_autoencoder(str(folder))), shown)[0]
    sheet = grid(list(rows.values()))
    factor = max(_SHOWN_SIDE // shown.shape[-1], 1)
    sheet = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    return _labelled(sheet, list(rows))


def _middle_tiles(names: Sequence[str], count: int) -> list[int]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return [tiles[len(tiles) // 2] for tiles in list(places.values())[:count]]


def _labelled(sheet: Image.Image, labels: Sequence[str], margin: int = 190) -> Image.Image:
    page = Image.new("RGB", (sheet.width + margin, sheet.height), (255, 255, 255))
    page.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(page)
    height = sheet.height / len(labels)
    for number, label in enumerate(labels):
        # Pillow's own font: no font file has to be found.
        draw.text((8, height * (number + 0.5)), label, fill=(40, 40, 40), font_size=15, anchor="lm")
    return page
