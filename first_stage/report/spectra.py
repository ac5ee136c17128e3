"""Spectra: how much of each frequency reconstructions keep, and where latents have their energy."""

from collections.abc import Sequence
from typing import Any

from first_stage.report.charts import Series, colour_of, line_chart
from first_stage.report.page import Section


def spectra_section(stages: Sequence[dict[str, Any]]) -> Section:
    """Energy by frequency of originals, reconstructions and latents."""
    first = stages[0]["sharpness"]
    frequency = first["frequency"]
    energy = [Series("originals", _points(frequency, first["original"]), 7)]
    kept = []
    latents = []
    for k, stage in enumerate(stages):
        sharpness, colour = stage["sharpness"], colour_of(k)
        name = stage["name"] if len(stages) > 1 else "reconstructions"
        energy.append(Series(name, _points(frequency, sharpness["reconstruction"]), colour))
        shares = [
            b / a if a and b is not None else None
            for a, b in zip(sharpness["original"], sharpness["reconstruction"], strict=True)
        ]
        kept.append(Series(name, _points(frequency, shares), colour))
        spectrum = stage["latent_health"]["spectrum"]
        latents.append(
            Series(
                stage["name"],
                _points(spectrum["frequency"], _normalised(spectrum["energy"])),
                colour,
            )
        )
    share = _points(frequency, _normalised(first["original"]))
    charts = [
        line_chart(
            "Energy kept",
            kept,
            "cycles per pixel",
            y_range=(0.0, None),
            log=False,
            note="Reconstructions over originals; 1 is right, below is blur, above is noise.",
            marks=(1.0,),
        ),
        line_chart(
            "Energy by frequency",
            energy,
            "cycles per pixel",
            log=True,
            note="Mean square of the cosine coefficients.",
        ),
        line_chart(
            "Energy of the latents",
            [*latents, Series("images, for comparison", share, 7, dashed=True)],
            "cycles per latent (images: per pixel)",
            log=True,
            note="Scaled to the same mean; latents that fall like images are easier to learn.",
        ),
    ]
    about = (
        '<p class="about">To the right are finer details: 0.25 cycles per pixel is a wave of four '
        "pixels, 0.5 the finest there is.</p>"
    )
    return Section("spectra", "Sharpness", f'{about}<div class="charts">{"".join(charts)}</div>')


def _points(xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float | None]]:
    return list(zip(xs, ys, strict=True))


def _normalised(ys: Sequence[float | None]) -> list[float | None]:
    """Scaled to a mean of 1 over the rings, so that curves of different sizes compare."""
    there = [y for y in ys if y is not None]
    mean = sum(there) / max(len(there), 1)
    return [None if y is None or mean == 0 else y / mean for y in ys]
