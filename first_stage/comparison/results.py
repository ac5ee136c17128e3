"""The comparison's table and figure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from first_stage.comparison.experiment import Photos, Result
from first_stage.comparison.measures import Scores
from first_stage.pictures import grid
from first_stage.validation import reconstruct

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
    lines = [_line(header), _line(["---"] + ["---:"] * len(_COLUMNS))]
    lines.append(_line(["original", "", f"{0:.1f}", f"{1:.3f}", f"{0:.2f}"]))
    for row, found in results.items():
        cells = [row if len(found) == seeds else f"{row} ({_seeds(len(found))})"]
        for _, form, value in _COLUMNS:
            numbers = [value(result.scores) for result in found]
            cells.append(_cell(numbers, form))
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(numbers: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(numbers):{form}}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ({min(numbers):{form}} to {max(numbers):{form}})"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def verdicts(results: Results, row: str = "learned+hinge", baseline: str = "mse") -> list[str]:
    """Whether a row is better than another by more than seeds differ, in words.

    The row's worst seed is held against the baseline's best one.

    Args:
        results: By row; nothing is said when one of the two is missing.
        row: The row.
        baseline: What it is compared with.
    """
    if row not in results or baseline not in results:
        return []
    ours, theirs = ([r.scores for r in results[name]] for name in (row, baseline))

    def ratios(value: Callable[[Scores], float]) -> tuple[str, list[float]]:
        """In words for the seeds, and between any two of them."""
        own = [value(a) / value(b) for a, b in zip(ours, theirs, strict=True)]
        shown = f"{min(own):.3f} to {max(own):.3f}" if len(own) > 1 else f"{own[0]:.3f}"
        return shown, [value(a) / value(b) for a in ours for b in theirs]

    frechet, frechets = ratios(lambda s: s.local_frechet)
    detail, details = ratios(lambda s: s.high_frequencies)
    feature, features = ratios(lambda s: s.feature_distance)
    most = max(a.high_frequencies for a in ours)
    return [
        _verdict(
            max(frechets) <= 0.5,
            f"{frechet} of {baseline}'s local Frechet distance in the same seed, at most "
            f"{max(frechets):.3f} between any two (wanted: <= 0.5)",
        ),
        _verdict(
            min(details) >= 3 and most <= 1,
            f"{detail} times {baseline}'s high frequencies in the same seed, at least "
            f"{min(details):.3f} between any two (wanted: >= 3), and at most {most:.3f} of the "
            "original's (wanted: <= 1)",
        ),
        _verdict(
            max(features) <= 1,
            f"{feature} of {baseline}'s feature distance in the same seed, at most "
            f"{max(features):.3f} between any two (wanted: <= 1)",
        ),
    ]


def _verdict(met: bool, text: str) -> str:
    return f"{'met' if met else 'NOT MET'}: {text}"


def stripes_table(results: Results, others: Mapping[str, float]) -> str:
    """The stripes experiment as a Markdown table.

    Args:
        results: By row; those whose critic learned a distance are listed, averaged over seeds.
        others: Ratios of other distances, by name.
    """
    lines = [
        _line(["distance", "d(stripes, shifted) / d(stripes, gray)"]),
        _line(["---", "---:"]),
        *(_line([name, f"{ratio:.2f}"]) for name, ratio in others.items()),
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
                _line([f"critic of {row}, {words}", f"{means['all']:.2f} (layers: {layers})"])
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
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval()
        rows[row] = reconstruct(vae, shown)
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
