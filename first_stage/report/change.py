"""Before and after: what was gained, image by image, and whether latents kept their meaning."""

from collections.abc import Sequence
from html import escape
from typing import Any

from first_stage.evaluation.change import Gain, change_in_words, gains_of
from first_stage.evaluation.drift import drift_in_words
from first_stage.report.charts import histogram
from first_stage.report.page import Section, details, table

_BINS = 30


def change_section(
    stages: Sequence[dict[str, Any]], change: dict[str, Any] | None
) -> Section | None:
    """Gains, drift and the images that gained least; nothing without a before and after."""
    if change is None:
        return None
    before, after = stages
    names = f"<b>{escape(before['name'])}</b> to <b>{escape(after['name'])}</b>"
    lines = [*change_in_words(change), drift_in_words(change["latents"])]
    body = f"<p>From {names}:</p><ul>" + "".join(f"<li>{escape(x)}.</li>" for x in lines) + "</ul>"
    gains = gains_of(after["per_image"])
    body += _gains(before, after, change, gains) + _spread(change) + _drift(change["latents"])
    return Section("change", "Before and after", body + _worst(change, gains))


def _gains(
    before: dict[str, Any], after: dict[str, Any], change: dict[str, Any], gains: Sequence[Gain]
) -> str:
    rows = []
    for gain in gains:
        found = change["gains"][gain.key]
        if not found["images"]:
            continue
        half = found["half_interval"]
        interval = "" if half is None else f" ± {half:.2g}"
        rows.append(
            [
                escape(gain.title),
                *(_mean(stage, gain.key) for stage in (before, after)),
                escape(gain.show(found["mean"])) + interval,
                f"{found['improved']:.0%}",
                escape(gain.show(found["least"])),
                escape(gain.show(found["most"])),
            ]
        )
    head = ["", "before", "after", "mean gain", "images better", "least", "most"]
    note = (
        '<p class="about">A gain above 0 is better, whatever the metric; ± is half of the 95 % '
        "interval of its mean over images.</p>"
    )
    return table(head, rows) + note


def _mean(stage: dict[str, Any], key: str) -> str:
    values = [v for row in stage["per_image"] if (v := row.get(key)) is not None]
    return f"{sum(values) / len(values):.4g}" if values else "–"


def _spread(change: dict[str, Any]) -> str:
    values = [v for row in change["per_image"] if (v := row.get("psnr")) is not None]
    if len(values) < 2 or max(values) == min(values):
        return ""
    low, high = min(values), max(values)
    counts = [0] * _BINS
    for value in values:
        counts[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += 1
    chart = histogram(counts, low, high, "gain in PSNR of the images", width=420)
    return (
        f'<figure class="spread">{chart}<figcaption>Gain of each image in PSNR: {low:+.2f} to '
        f"{high:+.2f} dB</figcaption></figure>"
    )


def _drift(drift: dict[str, Any]) -> str:
    rows = [
        [str(place), "–" if moved is None else f"{moved:.3g}"]
        for place, moved in enumerate(drift["channels"])
    ]
    head = ["channel", "root mean square of its change, in standard deviations before"]
    relative = "–" if drift["relative"] is None else f"{drift['relative']:.3g}"
    return details(f"Drift of the latents by channel; all together {relative}", table(head, rows))


def _worst(change: dict[str, Any], gains: Sequence[Gain]) -> str:
    rows = {row["index"]: row for row in change["per_image"]}
    listed = [
        [
            escape(rows[place]["id"]),
            *(
                "–" if (value := rows[place][gain.key]) is None else escape(gain.show(value))
                for gain in gains
            ),
        ]
        for place in change["worst"]
    ]
    title = f"The {len(listed)} images that gained least, with their pictures below"
    return details(title, table(["image", *(escape(gain.title) for gain in gains)], listed))
