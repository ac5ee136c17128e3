"""Before and after: what a first stage gained over the one it came from, image by image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WORST = 10
"""Images that gained least, shown as pictures and by name."""


@dataclass(frozen=True)
class Gain:
    """A metric of images, and which way is better.

    Attributes:
        key: Its name in the rows.
        title: For people.
        sign: 1 where more is better, -1 where less is.
        show: A gain as text.
    """

    key: str
    title: str
    sign: int
    show: Callable[[float], str]


def gains_of(rows: list[dict[str, Any]]) -> list[Gain]:
    """The metrics that these rows have."""
    found = [
        Gain("psnr", "PSNR", 1, _signed(2, " dB")),
        Gain("ssim", "SSIM", 1, _signed(4)),
        Gain("ms_ssim", "MS-SSIM", 1, _signed(4)),
        Gain("l1", "L1", -1, _signed(4)),
        Gain("lpips", "LPIPS", -1, _signed(4)),
        Gain("high_frequency_agreement", "detail agreement", 1, _signed(4)),
    ]
    distances = [key for key in (rows[0] if rows else {}) if key.startswith("feature_distance/")]
    found += [Gain(k, f"distance, {k.partition('/')[2]}", -1, _signed(4)) for k in distances]
    return [gain for gain in found if any(gain.key in row for row in rows)]


def change_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare two entries of an evaluation, of the same images.

    Args:
        before: What it came from.
        after: What it became; with `drift`, as `Drift.summary` gives it.

    Returns:
        `before` and `after`: their names; `latents`: the drift; `gains`: for each metric `mean` of
        the images' gains (above 0 is better, whatever the metric), `half_interval`, half of its
        95 % confidence interval (`None` for one image), `least` and `most`, `improved`, the share
        of the images that are better, and `images`, how many have one; `per_image`: each image's
        gains by metric, its `latent_change`, and its `rank` by gain in PSNR, 0 for the least;
        `worst`: places in the list of the images that gained least, the least first.
    """
    earlier = {row["index"]: row for row in before["per_image"]}
    pairs = [(earlier[row["index"]], row) for row in after["per_image"] if row["index"] in earlier]
    gains = gains_of([row for _, row in pairs])
    ranked = [new["index"] for _, new in sorted(pairs, key=lambda pair: _change(*pair))]
    ranks = {index: rank for rank, index in enumerate(ranked)}
    per_image = [
        {
            "index": new["index"],
            "id": new["id"],
            "rank": ranks[new["index"]],
            "latent_change": new.get("latent_change"),
            **{gain.key: _gain(old, new, gain) for gain in gains},
        }
        for old, new in pairs
    ]
    return {
        "before": before["name"],
        "after": after["name"],
        "latents": after["drift"],
        "gains": {gain.key: _summary([row[gain.key] for row in per_image]) for gain in gains},
        "worst": ranked[:WORST],
        "per_image": per_image,
    }


def ranking(change: dict[str, Any]) -> list[int]:
    """Places of all images, from the one that gained least in PSNR to the one that gained most."""
    return [row["index"] for row in sorted(change["per_image"], key=lambda row: row["rank"])]


def change_in_words(change: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    sentences = []
    psnr = change["gains"].get("psnr")
    if psnr is not None and psnr["images"]:
        mean, half = psnr["mean"], psnr["half_interval"]
        known = "" if half is None else f" (± {half:.2f})"
        word = "better" if mean > 0 else "worse"
        if half is not None and abs(mean) <= half:
            word = "no clear difference"
        least = f"the image that gained least {'gained' if psnr['least'] >= 0 else 'lost'} "
        sentences.append(
            f"{mean:+.2f} dB PSNR on average over {psnr['images']:,} images{known}: {word}; "
            f"{psnr['improved']:.0%} of them are better, and {least}{abs(psnr['least']):.2f} dB"
        )
    return sentences


def _gain(before: dict[str, Any], after: dict[str, Any], gain: Gain) -> float | None:
    """How much better an image is; `None` where there is no number, as of an exact one."""
    if gain.key == "psnr" and before["identical"] and after["identical"]:
        return 0.0
    old, new = before.get(gain.key), after.get(gain.key)
    return None if old is None or new is None else gain.sign * (new - old)


def _change(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The ratio of errors, before over after, in dB: the gain in PSNR, also of exact images."""
    old, new = before["mse"], after["mse"]
    if old == new:
        return 0.0
    if old == 0 or new == 0:
        return -math.inf if old == 0 else math.inf
    return 10 * math.log10(old / new)


def _summary(values: list[float | None]) -> dict[str, Any]:
    there = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(there):
        return dict.fromkeys(("mean", "half_interval", "least", "most", "improved")) | {"images": 0}
    spread = float(there.std(ddof=1)) if len(there) > 1 else None
    return {
        "mean": float(there.mean()),
        "half_interval": None if spread is None else 1.96 * spread / math.sqrt(len(there)),
        "least": float(there.min()),
        "most": float(there.max()),
        "improved": float((there > 0).mean()),
        "images": len(there),
    }


def _signed(digits: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:+.{digits}f}{unit}"
