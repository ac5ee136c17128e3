"""The latents: channel by channel in figures, histograms and pictures; what transforms do."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from first_stage.report.charts import histogram, number
from first_stage.report.page import Section, data_uri, details, file_uri, table

_OPEN_CHANNELS = 8
_TRANSFORMS = {
    "flip": "mirrored left to right",
    "rotate_90": "turned by 90°",
    "scale_0.5": "halved in size",
}


def latents_section(
    stages: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], folder: Path
) -> Section:
    """Health of the latents of each first stage."""
    body = ""
    for k, stage in enumerate(stages):
        if len(stages) > 1:
            body += f"<h3>{escape(stage['name'])}</h3>"
        body += _stage(stage, k, pairs, folder)
    return Section("latents", "Latents", body)


def _stage(stage: dict[str, Any], place: int, pairs: Sequence[dict[str, Any]], folder: Path) -> str:
    health = stage["latent_health"]
    channels = health["channels"]
    text = f"{health['active_channels']} of {len(channels)} channels carry signal"
    if health["kl"] is not None:
        text += f"; KL {health['kl']:,.1f} nats per image"
    elif not health["posterior"]:
        text += "; this first stage has no posterior"
    share = health["spectrum"]["high_frequency_share"]
    if share is not None:
        text += f"; {share:.0%} of their energy is at 0.25 cycles per latent and above"
        text += " (white noise: about 80%)"
    body = f"<p>{escape(text)}.</p>" + _for_diffusion(stage)
    pictures = _pictures(place, pairs, folder)
    rows = [_channel(c, entry) for c, entry in enumerate(channels)]
    head = ["channel", "histogram", "mean", "std", "share of variance", "excess kurtosis"]
    if health["posterior"]:
        head += ["KL (nats)", "noise std", "signal / noise", "active"]
    else:
        head += ["active"]
    figures = table(head, rows, numeric_from=2, kind="channels")
    if len(rows) > _OPEN_CHANNELS:
        figures = details(f"All {len(rows)} channels", figures)
    return body + pictures + figures + _transforms(stage)


def _for_diffusion(stage: dict[str, Any]) -> str:
    """What says without training how easily a diffusion model learns these latents."""
    health = stage["latent_health"]
    rows = []
    halved = health["equivariance"].get("scale_0.5", {}).get("psnr_to_image")
    if halved is not None:
        rows.append(
            [
                "halved latents",
                f"{halved:.2f} dB",
                "what they decode to, against the halved image: the higher, the more latents are "
                "like a small image",
            ]
        )
    slope, images = health["spectrum"].get("slope"), stage["sharpness"].get("slope")
    if slope is not None and images is not None:
        rows.append(
            [
                "slope of the spectrum",
                f"{slope:.2f} (images: {images:.2f})",
                "how energy falls with frequency, as a power of it: near 0 latents are like noise, "
                "which has nothing coarse to begin with",
            ]
        )
    if (repeated := health.get("redundancy")) is not None:
        rows.append(
            [
                "redundancy of channels",
                f"{repeated:.0%}",
                "how far channels repeat each other: at 0% none does, and whitening "
                "(first-stage export --whiten) takes it away",
            ]
        )
    shares = sorted((c.get("variance_share") or 0.0 for c in health["channels"]), reverse=True)
    half = next((n for n in range(1, len(shares) + 1) if sum(shares[:n]) >= 0.5), None)
    if half is not None:
        rows.append(
            [
                "channels with half of the variance",
                f"{half} of {len(shares)}",
                "a diffusion model that scales channels to unit variance makes the others as loud "
                "as these",
            ]
        )
    if not rows:
        return ""
    head = ["for a diffusion model", "", "what it says"]
    return table(head, rows, numeric_from=len(head))


def _channel(place: int, entry: dict[str, Any]) -> list[str]:
    chart = ""
    if (h := entry.get("histogram")) is not None:
        chart = histogram(h["counts"], h["low"], h["high"], f"values of channel {place}")
    kurtosis = entry["excess_kurtosis"]
    cells = [
        str(place),
        chart,
        f"{entry['mean']:.3f}",
        f"{entry['std']:.3f}",
        "–" if (share := entry.get("variance_share")) is None else f"{share:.1%}",
        "–" if kurtosis is None else f"{kurtosis:.2f}",
    ]
    if entry["kl"] is not None:
        ratio = entry["signal_to_noise"]
        cells += [
            f"{entry['kl']:,.1f}",
            f"{entry['noise_std']:.3g}",
            "–" if ratio is None else number(ratio),
        ]
    return [*cells, "yes" if entry["active"] else "<b>no</b>"]


def _pictures(place: int, pairs: Sequence[dict[str, Any]], folder: Path) -> str:
    rows = []
    for pair in pairs:
        latents = pair["latents"][place]
        if latents is None:
            continue
        with Image.open(folder / latents["file"]) as strip:
            strip.load()
        width, height = latents["width"], latents["height"]
        cells = []
        for c in range(latents["channels"]):
            buffer = io.BytesIO()
            strip.crop((c * width, 0, (c + 1) * width, height)).save(buffer, format="PNG")
            cells.append(
                f'<img src="{data_uri(buffer.getvalue())}" width="{width}" height="{height}" '
                f'alt="channel {c}" title="channel {c}">'
            )
        source, name = file_uri(folder / pair["original"]), escape(pair["id"])
        original = f'<img class="of" src="{source}" alt="{name}">'
        rows.append(f'<div class="strip">{original}<div>{"".join(cells)}</div></div>')
    if not rows:
        return ""
    about = "Each channel of the latents of these images; gray is its mean, black and white are "
    return f'<p class="about">{about}three standard deviations away.</p>{"".join(rows)}'


def _transforms(stage: dict[str, Any]) -> str:
    found = stage["latent_health"]["equivariance"]
    if not found:
        return ""
    rows = [
        [
            f"latents {words}",
            _decibels(found[name]["psnr_to_image"]),
            _decibels(found[name]["psnr_change"]),
        ]
        for name, words in _TRANSFORMS.items()
        if name in found
    ]
    rows.insert(0, ["latents as they are", _decibels(found["psnr_unchanged"]), "–"])
    head = ["decoded from", "against the image, changed alike", "against its reconstruction"]
    count = f"{found['images']} image" + ("s" if found["images"] != 1 else "")
    return (
        "<h4>When latents are mirrored, turned or halved</h4>"
        f'<p class="about">PSNR over {count}. The higher, the more the latents behave like a small '
        "image, which diffusion models learn more easily.</p>" + table(head, rows)
    )


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.2f} dB"
