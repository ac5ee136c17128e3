"""Sections with an evaluation's figures: summary, comparison, one row per image."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from first_stage.evaluation.table import Column, columns, latent_layout, remarks
from first_stage.handover.card import load_lines
from first_stage.report.charts import histogram, number
from first_stage.report.page import Section, details, table

_WORST = 50
_HISTOGRAM_BINS = 30
_ARROWS = {"higher": ' <span class="arrow" title="higher is better">↑</span>',
           "lower": ' <span class="arrow" title="lower is better">↓</span>', "": ""}  # fmt: skip


def summary_section(
    stages: Sequence[dict[str, Any]], protocol: dict[str, Any], run: Path | None
) -> Section:
    """Key figures, what was measured and how, and what a reader must know about it."""
    body = ""
    if len(stages) == 1:
        body += _cards(stages[0])
    count = int(protocol["images"])
    many = "s" if count != 1 else ""
    names = ", ".join(f"<b>{escape(s['name'])}</b> ({_network(s)})" for s in stages)
    body += (
        f"<p>{names} on {count:,} image{many} of <code>{escape(str(protocol['data']))}</code>; "
        f"crop: {escape(str(protocol['crop']))}; resize: {escape(str(protocol['resize']))}.</p>"
    )
    notes = remarks(stages)
    if notes:
        body += "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    rows = [[escape(k.replace("_", " ")), escape(str(v))] for k, v in protocol.items()]
    body += details("Protocol: how this was measured", table(["", ""], rows, numeric_from=9))
    if run is not None and (run / "export" / "config.json").is_file():
        made = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
        code = "\n".join(load_lines(made, f"{run.name}/export"))
        body += details("Load the exported first stage", f"<pre>{escape(code)}</pre>")
    return Section("summary", "Summary", body)


def comparison_section(stages: Sequence[dict[str, Any]]) -> Section | None:
    """The first stages side by side; nothing for one alone."""
    if len(stages) < 2:
        return None
    head = [""]
    for k, stage in enumerate(stages):
        head.append(f'<i class="c{k % 8} dot"></i>{escape(stage["name"])}')
    rows = [
        ["latents", *map(latent_layout, stages)],
        ["weights", *(number(stage["parameters"]) for stage in stages)],
    ]
    for column in columns(stages):
        best = column.best(stages)
        title = f"{escape(column.title)}{_ARROWS[column.better]}"
        cells = [
            f'<b class="best">{escape(column.text(s))}</b>' if k == best else escape(column.text(s))
            for k, s in enumerate(stages)
        ]
        rows.append([f"{title}<small>{escape(column.about)}</small>", *cells])
    return Section("comparison", "Comparison", table(head, rows, kind="wide"))


def per_image_section(stages: Sequence[dict[str, Any]]) -> Section:
    """How the figures spread over images, and the worst images by name."""
    body = ""
    for stage in stages:
        rows = stage["per_image"]
        values = [r["psnr"] for r in rows if r["psnr"] is not None]
        ranked = sorted(rows, key=lambda r: (r["identical"], r["psnr"] or 0.0))
        part = ""
        if len(values) >= 2 and max(values) > min(values):
            part += _psnr_spread(values)
        keys = [k for k in ("psnr", "ssim", "ms_ssim", "l1", "lpips") if k in ranked[0]]
        titles = {
            "psnr": "PSNR",
            "ssim": "SSIM",
            "ms_ssim": "MS-SSIM",
            "l1": "L1",
            "lpips": "LPIPS",
        }
        listed = [
            [escape(r["id"]), f"{r['width']} × {r['height']}", *(_cell(r, k) for k in keys)]
            for r in ranked[:_WORST]
        ]
        head = ["image", "size", *(titles[k] for k in keys)]
        title = f"The {len(listed)} worst of {len(rows):,} images, worst first"
        if len(rows) <= _WORST:
            title = f"All {len(rows)} images, worst first"
        part += details(title, table(head, listed))
        if len(stages) > 1:
            part = f"<h3>{escape(stage['name'])}</h3>" + part
        body += part
    return Section("images", "Image by image", body)


def _psnr_spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    counts = [0] * _HISTOGRAM_BINS
    for v in values:
        counts[min(int((v - low) / (high - low) * _HISTOGRAM_BINS), _HISTOGRAM_BINS - 1)] += 1
    middle = sorted(values)[len(values) // 2]
    chart = histogram(counts, low, high, "PSNR of the images", width=420)
    return (
        f'<figure class="spread">{chart}<figcaption>PSNR of each image, in dB: '
        f"{low:.2f} to {high:.2f}, median {middle:.2f}</figcaption></figure>"
    )


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "psnr" and row["identical"]:
        return "identical"
    value = row.get(key)
    return "–" if value is None else (f"{value:.2f} dB" if key == "psnr" else f"{value:.4f}")


def _cards(stage: dict[str, Any]) -> str:
    def card(column: Column) -> str:
        return (
            f'<div class="card"><span>{escape(column.title)}{_ARROWS[column.better]}</span>'
            f"<b>{escape(column.text(stage))}</b><small>{escape(column.about)}</small></div>"
        )

    return f'<div class="cards">{"".join(card(c) for c in columns([stage]))}</div>'


def _network(stage: dict[str, Any]) -> str:
    ratio = stage["values_per_latent"]
    return (
        f"{escape(stage['class'])}, {number(stage['parameters'])} weights, "
        f"{latent_layout(stage)}: one latent value for {ratio:.3g} pixel values"
    )
