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
_START = {"mode": "wipe", "sort": "data", "stage": "0"}
"""What is chosen before anyone chooses."""


def pairs_section(
    stages: Sequence[dict[str, Any]],
    pairs: Sequence[dict[str, Any]],
    folder: Path,
    change: dict[str, Any] | None = None,
) -> Section | None:
    """The pairs of an evaluation; nothing when it kept none.

    Args:
        stages: The first stages.
        pairs: From `evaluation.files.load`.
        folder: The evaluation's.
        change: Of a before and after: both stand beside the original, least gain first.
    """
    if not pairs:
        return None
    rows = [{r["index"]: r for r in stage["per_image"]} for stage in stages]
    gains = {} if change is None else _gains(change)
    if gains:
        pairs = sorted(pairs, key=lambda pair: gains[pair["index"]][0])
    figures = "".join(_pair(pair, stages, rows, folder, gains.get(pair["index"])) for pair in pairs)
    cropped = any(pair["cropped"] for pair in pairs)
    count, total = len(pairs), len(stages[0]["per_image"])
    which = "the worst by PSNR"
    if change is not None:
        least = sum(pair["index"] in change["worst"] for pair in pairs)
        which = f"the {least} that gained least in PSNR"
    about = (
        "All images." if count == total else
        f"{count} of {total:,} images: {which}, the others spread over the ranking."
    ) + (" Large images show their centre." if cropped else "")  # fmt: skip
    small = all(max(pair["width"], pair["height"]) < _SMALL_BELOW for pair in pairs)
    kind, start = "pairs small" if small else "pairs", _START
    if change is not None:
        kind, start = f"{kind} change", {"mode": "side", "sort": "gain", "stage": "1"}
    data = "".join(f' data-{name}="{value}"' for name, value in start.items())
    grid = f'<div class="{kind}"{data}>{figures}</div>'
    body = f'<p class="about">{about}</p>{_toolbar(stages, start)}{grid}'
    title = "Originals and reconstructions" if change is None else "Original, before and after"
    return Section("pairs", title, body)


def _gains(change: dict[str, Any]) -> dict[int, tuple[int, str]]:
    """Place in the ranking by gain, and the gain in words, of each image."""
    ranked = sorted(change["per_image"], key=lambda row: row["rank"])
    return {
        row["index"]: (row["rank"], "" if row["psnr"] is None else f"{row['psnr']:+.2f} dB")
        for row in ranked
    }


def _toolbar(stages: Sequence[dict[str, Any]], start: dict[str, str]) -> str:
    def group(name: str, label: str, choices: list[tuple[str, str]]) -> str:
        buttons = "".join(
            f'<button type="button" data-{name}="{value}" '
            f'aria-pressed="{str(value == start[name]).lower()}">{escape(text)}</button>'
            for value, text in choices
        )
        return f'<div role="group" aria-label="{label}">{buttons}</div>'

    parts = []
    for name, label, choices in _CHOICES:
        if start[name] == "gain":
            choices = [("gain", "Least gain first"), *choices]
        parts.append(group(name, label, choices))
    if len(stages) > 1:
        names = [(str(k), stage["name"]) for k, stage in enumerate(stages)]
        parts.append(group("stage", "First stage", names))
    return f'<div class="toolbar">{"".join(parts)}</div>'


def _pair(
    pair: dict[str, Any],
    stages: Sequence[dict[str, Any]],
    rows: Sequence[dict[int, dict[str, Any]]],
    folder: Path,
    gain: tuple[int, str] | None,
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
        chosen = " chosen" if k == (0 if gain is None else 1) else ""
        views.append(
            f'<div class="view reconstruction{chosen}" data-stage="{k}">'
            f'<img src="{file_uri(folder / path)}" {size} alt="reconstruction of {name}">'
            f"<span>{label}</span></div>"
        )
        only = f"{label}: " if len(stages) > 1 else ""
        figures.append(
            f'<span class="figures{chosen}" data-stage="{k}">{only}{_figures(row)}</span>'
        )
    if gain is not None and gain[1]:
        figures.append(f'<span class="gain">gain {gain[1]}</span>')
    worst = [_rank(r[pair["index"]]) for r in rows]
    place = "" if gain is None else f' data-gain="{gain[0]}"'
    small = " pixelated" if max(pair["width"], pair["height"]) < _PIXELATED_BELOW else ""
    return (
        f'<figure class="pair{small}" data-order="{pair["index"]}" '
        f'data-psnr="{" ".join(worst)}"{place} style="--ratio:{pair["width"]}/{pair["height"]}">'
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
