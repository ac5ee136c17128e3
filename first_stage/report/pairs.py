"""Originals beside reconstructions: wiped, subtracted or side by side, sorted, zoomed.

Without JavaScript they stand side by side; the script of the page lays them over each other.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from first_stage.report.page import Section, file_uri

_PIXELATED_BELOW = 160
_SMALL_BELOW = 80
_CHOICES = [
    ("mode", "View", [("wipe", "Wipe"), ("difference", "Difference ×4"), ("side", "Side by side")]),
    (
        "sort",
        "Order",
        [("data", "As in the data"), ("worst", "Worst first"), ("best", "Best first")],
    ),
]


def pairs_section(
    stages: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], folder: Path
) -> Section | None:
    """The pairs of an evaluation; nothing when it kept none."""
    if not pairs:
        return None
    rows = [{r["index"]: r for r in stage["per_image"]} for stage in stages]
    figures = "".join(_pair(pair, stages, rows, folder) for pair in pairs)
    cropped = any(pair["cropped"] for pair in pairs)
    count, total = len(pairs), len(stages[0]["per_image"])
    about = (
        "All images." if count == total else
        f"{count} of {total:,} images: the worst by PSNR, the others spread over the ranking."
    ) + (" Large images show their centre." if cropped else "")  # fmt: skip
    small = all(max(pair["width"], pair["height"]) < _SMALL_BELOW for pair in pairs)
    grid = f'<div class="pairs{" small" if small else ""}">{figures}</div>'
    body = f'<p class="about">{about}</p>{_toolbar(stages)}{grid}'
    return Section("pairs", "Originals and reconstructions", body)


def _toolbar(stages: Sequence[dict[str, Any]]) -> str:
    def group(name: str, label: str, choices: list[tuple[str, str]]) -> str:
        buttons = "".join(
            f'<button type="button" data-{name}="{value}" aria-pressed="{str(k == 0).lower()}">'
            f"{escape(text)}</button>"
            for k, (value, text) in enumerate(choices)
        )
        return f'<div role="group" aria-label="{label}">{buttons}</div>'

    parts = [group(name, label, choices) for name, label, choices in _CHOICES]
    if len(stages) > 1:
        names = [(str(k), stage["name"]) for k, stage in enumerate(stages)]
        parts.append(group("stage", "First stage", names))
    return f'<div class="toolbar">{"".join(parts)}</div>'


def _pair(
    pair: dict[str, Any],
    stages: Sequence[dict[str, Any]],
    rows: Sequence[dict[int, dict[str, Any]]],
    folder: Path,
) -> str:
    size = f'width="{pair["width"]}" height="{pair["height"]}"'
    name = escape(pair["id"])
    views = [
        f'<div class="view original"><img src="{file_uri(folder / pair["original"])}" {size} '
        f'alt="original of {name}"><span>original</span></div>'
    ]
    figures = []
    for k, (stage, path) in enumerate(zip(stages, pair["reconstructions"], strict=True)):
        row = rows[k][pair["index"]]
        label = escape(stage["name"]) if len(stages) > 1 else "reconstruction"
        chosen = " chosen" if k == 0 else ""
        views.append(
            f'<div class="view reconstruction{chosen}" data-stage="{k}">'
            f'<img src="{file_uri(folder / path)}" {size} alt="reconstruction of {name}">'
            f"<span>{label}</span></div>"
        )
        only = f"{label}: " if len(stages) > 1 else ""
        figures.append(
            f'<span class="figures{chosen}" data-stage="{k}">{only}{_figures(row)}</span>'
        )
    worst = [_rank(r[pair["index"]]) for r in rows]
    small = " pixelated" if max(pair["width"], pair["height"]) < _PIXELATED_BELOW else ""
    return (
        f'<figure class="pair{small}" data-order="{pair["index"]}" '
        f'data-psnr="{" ".join(worst)}" style="--ratio:{pair["width"]}/{pair["height"]}">'
        f'<div class="views">{"".join(views)}<i class="handle"></i></div>'
        f'<div class="controls"><input class="wipe" type="range" min="0" max="100" step="0.5" '
        f'value="50" aria-label="Wipe between original and reconstruction of {name}">'
        f'<button type="button" class="zoom">Zoom</button></div>'
        f"<figcaption><b>{name}</b>{''.join(figures)}</figcaption></figure>"
    )


def _figures(row: dict[str, Any]) -> str:
    if row["identical"]:
        return "identical"
    parts = [f"{row['psnr']:.2f} dB"]
    if row.get("ssim") is not None:
        parts.append(f"SSIM {row['ssim']:.3f}")
    if row.get("high_frequency_kept") is not None:
        parts.append(f"detail kept {row['high_frequency_kept']:.0%}")
    return ", ".join(parts)


def _rank(row: dict[str, Any]) -> str:
    return "999" if row["identical"] else f"{row['psnr']:.4f}"
