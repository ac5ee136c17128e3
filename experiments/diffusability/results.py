"""The table: means over seeds with confidence intervals, what is a gain, and a picture."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from experiments.diffusability.yardstick import SAMPLES, Cell

# Student's t: of 95 % of the mass between -t and t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Result:
    """A cell and what the evaluator says of its first stage."""

    cell: Cell
    evaluation: dict[str, Any]


Results = Mapping[str, Sequence[Result]]
"""Results of the seeds by first stage."""


@dataclass(frozen=True)
class Column:
    """A figure of the table.

    Attributes:
        title: Its name.
        form: How a number is written.
        value: A result's number; `None` where there is none.
    """

    title: str
    form: str
    value: Callable[[Result], float | None]


def _of_evaluation(*keys: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found: Any = result.evaluation
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return None if found is None else float(found)

    return value


JUDGED = Column("Fréchet distance, judge", ".2f", lambda r: r.cell.judge_distance)
SEEN = Column("Fréchet distance, network", ".1f", lambda r: r.cell.network_distance)
FLOOR = Column("of reconstructions", ".2f", _of_evaluation("judge_floor"))
PSNR = Column("PSNR (dB)", ".2f", _of_evaluation("metrics", "psnr", "of_mean_error"))
COLUMNS = (
    JUDGED,
    FLOOR,
    SEEN,
    Column("read as asked (%)", ".1f", lambda r: _percent(r.cell.read_as_asked)),
    PSNR,
    Column(
        "halved (dB)",
        ".2f",
        _of_evaluation("latent_health", "equivariance", "scale_0.5", "psnr_to_image"),
    ),
    Column("slope", ".2f", _of_evaluation("latent_health", "spectrum", "slope")),
    Column("redundancy", ".2f", _of_evaluation("latent_health", "redundancy")),
)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def values(results: Sequence[Result], column: Column) -> list[float]:
    """A column's numbers, of the seeds that have one."""
    return [v for r in results if (v := column.value(r)) is not None]


def interval(numbers: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean; `None` of fewer than two numbers."""
    if len(numbers) < 2:
        return None
    t = _T[min(len(numbers) - 2, len(_T) - 1)]
    return t * statistics.stdev(numbers) / math.sqrt(len(numbers))


def table(results: Results) -> str:
    """A Markdown table: a row for each first stage, mean and half of the 95 % interval."""
    columns = [c for c in COLUMNS if any(values(found, c) for found in results.values())]
    lines = [_line(["first stage", "seeds", *(c.title for c in columns)])]
    lines.append(_line(["---"] + ["---:"] * (len(columns) + 1)))
    for name, found in results.items():
        cells = [_text(values(found, column), column.form) for column in columns]
        lines.append(_line([name, str(len(found)), *cells]))
    return "\n".join(lines)


def _text(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "–"
    half = interval(numbers)
    mean = f"{statistics.fmean(numbers):{form}}"
    return mean if half is None else f"{mean} ± {half:{form}}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def pooled(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The pooled standard deviation of two sets of seeds; `None` with fewer than two in either."""
    if min(len(one), len(other)) < 2:
        return None
    squares = sum((len(x) - 1) * statistics.variance(x) for x in (one, other))
    return math.sqrt(squares / (len(one) + len(other) - 2))


def verdicts(results: Results, baseline: str) -> list[str]:
    """What each first stage gains over another, in words; a gain is more than two pooled s.d.

    Args:
        results: By first stage.
        baseline: What the others are held against; nothing is said when it is missing.
    """
    if baseline not in results:
        return []
    return [
        line
        for column in (JUDGED, SEEN)
        for name, found in results.items()
        if name != baseline and (line := _verdict(name, found, baseline, results, column))
    ]


def _verdict(
    name: str, found: Sequence[Result], baseline: str, results: Results, column: Column
) -> str:
    ours, theirs = values(found, column), values(results[baseline], column)
    if not ours or not theirs:
        return ""
    change = statistics.fmean(ours) - statistics.fmean(theirs)
    cost = statistics.fmean(values(found, PSNR)) - statistics.fmean(values(results[baseline], PSNR))
    spread = pooled(ours, theirs)
    if spread is None:
        word = "one seed, so nothing is claimed"
    elif abs(change) <= 2 * spread:
        word = f"within two pooled standard deviations ({spread:.2f} each): no difference shown"
    else:
        word = f"{'gain' if change < 0 else 'LOSS'}, {abs(change) / spread:.1f} pooled s.d."
    return (
        f"{name}: {column.title} {change / statistics.fmean(theirs):+.0%} of {baseline}'s, PSNR "
        f"{cost:+.2f} dB: {word}"
    )


def correlations(results: Results) -> list[str]:
    """How far figures without training agree with the measured distance over all cells, in words.

    Spearman's rank correlation, over first stages and seeds alike.
    """
    every = [result for found in results.values() for result in found]
    measured = JUDGED if any(values(found, JUDGED) for found in results.values()) else SEEN
    lines = []
    for column in (FLOOR, *COLUMNS[COLUMNS.index(PSNR) :]):
        pairs = [
            (a, b)
            for result in every
            if (a := column.value(result)) is not None and (b := measured.value(result)) is not None
        ]
        if len(pairs) > 2:
            rank = _spearman([a for a, _ in pairs], [b for _, b in pairs])
            lines.append(f"{column.title} and {measured.title}: {rank:+.2f} over {len(pairs)}")
    return lines


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [_ranks(one), _ranks(other)]
    if min(statistics.pstdev(r) for r in ranks) == 0:
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(numbers: Sequence[float]) -> list[float]:
    """Ranks from 0; equal numbers share the mean of theirs."""
    return [
        sum(other < number for other in numbers) + (sum(o == number for o in numbers) - 1) / 2
        for number in numbers
    ]


def figure(folders: Mapping[str, Path], margin: int = 190) -> Image.Image:
    """Samples of the first seed of each first stage, one below the other, enlarged twice."""
    sheets = {name: Image.open(folder / SAMPLES).convert("RGB") for name, folder in folders.items()}
    big = {
        n: s.resize((2 * s.width, 2 * s.height), Image.Resampling.NEAREST)
        for n, s in sheets.items()
    }
    width = margin + max(sheet.width for sheet in big.values())
    page = Image.new("RGB", (width, sum(s.height + 8 for s in big.values())), (255, 255, 255))
    draw, top = ImageDraw.Draw(page), 0
    for name, sheet in big.items():
        page.paste(sheet, (margin, top))
        draw.text((8, top + sheet.height / 2), name, fill=(40, 40, 40), font_size=15, anchor="lm")
        top += sheet.height + 8
    return page
