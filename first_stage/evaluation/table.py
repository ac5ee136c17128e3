"""The comparison of first stages as text, and the columns that it shares with the report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One figure of the comparison.

    Attributes:
        title: Its name.
        better: `higher`, `lower`, or empty where neither is.
        value: A first stage's number, or `None`.
        show: The number as text.
        about: What it is, in a sentence.
    """

    title: str
    better: str
    value: Callable[[dict[str, Any]], float | None]
    show: Callable[[float], str]
    about: str

    def text(self, stage: dict[str, Any]) -> str:
        """The figure as text, with a dash where there is none."""
        value = self.value(stage)
        return "–" if value is None else self.show(value)

    def best(self, stages: Sequence[dict[str, Any]]) -> int | None:
        """Place of the best of several first stages, if this figure ranks them."""
        values = [(v, k) for k, s in enumerate(stages) if (v := self.value(s)) is not None]
        if not self.better or len(values) < 2:
            return None
        return max(values)[1] if self.better == "higher" else min(values)[1]


def columns(stages: Sequence[dict[str, Any]]) -> list[Column]:
    """The figures of these first stages that at least one of them has."""
    found = [
        *_OF_IMAGES,
        *_of_networks(stages),
        *_of_channels(stages),
        *_OF_LATENTS,
        *_OF_PROBES,
        *_OF_CODES,
    ]
    return [c for c in found if any(c.value(stage) is not None for stage in stages)]


def latent_layout(stage: dict[str, Any]) -> str:
    """`f8 c4`: downsample factor and channels."""
    return f"f{stage['downsample_factor']} c{stage['latent_channels']}"


def comparison_table(stages: Sequence[dict[str, Any]]) -> str:
    """Figures as lines of text, one column per first stage; `*` marks the best of several.

    Args:
        stages: Entries of an `Evaluation`.

    Returns:
        One line per figure under a line of names.
    """
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    rows = [
        ["", *(stage["name"] for stage in stages)],
        ["latents", *map(latent_layout, stages)],
    ]
    for column in columns(stages):
        best = column.best(stages)
        cells = [column.text(s) + ("*" if k == best else " ") for k, s in enumerate(stages)]
        rows.append([column.title + arrows[column.better], *cells])
    widths = [max(len(row[i].strip()) for row in rows) + 1 for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell if cell[-1] in "* " else cell + " " for cell in row[1:]]
        first = row[0].ljust(widths[0])
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first, *aligned]).rstrip())
    return "\n".join(lines)


def remarks(stages: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the figures must know: identical images, singular covariances, gaps."""
    found: dict[str, None] = {}
    for stage in stages:
        psnr, ms_ssim = stage["metrics"]["psnr"], stage["metrics"]["ms_ssim"]
        if count := psnr["identical_images"]:
            found[
                f"{stage['name']}: {count} reconstruction(s) equal their originals exactly; their "
                "PSNR is infinite and left out of the mean"
            ] = None
        total = len(stage["per_image"])
        if ms_ssim["images"] < total:
            small = total - ms_ssim["images"]
            found[f"MS-SSIM needs 176 pixels a side: {small} of {total} images are smaller"] = None
        for name, entry in stage["features"].items():
            if entry["note"]:
                found[f"{name}: {entry['note']}"] = None
        if stage["unreadable"]:
            first = next(iter(stage["unreadable"].items()))
            found[
                f"{len(stage['unreadable'])} image(s) could not be decoded and are left out "
                f"(first: {first[0]}: {first[1]})"
            ] = None
    return list(found)


def _band(channel: int, name: str) -> Callable[[dict[str, Any]], float | None]:
    def value(stage: dict[str, Any]) -> float | None:
        found = [band[name] for band in stage.get("bands", []) if band["channel"] == channel]
        return found[0] if found else None

    return value


def _at(*keys: str) -> Callable[[dict[str, Any]], float | None]:
    """What lies behind these keys; `None` where an earlier version's evaluation has none."""

    def value(stage: dict[str, Any]) -> float | None:
        found: Any = stage
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    return value


def _mean(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda stage: stage["metrics"].get(name, {}).get("mean")


def _frechet(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda stage: stage["features"].get(name, {}).get("frechet_distance")


def _feature_distance(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda stage: stage["features"].get(name, {}).get("feature_distance", {}).get("mean")


def _digits(count: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:,.{count}f}{unit}"


def _of_networks(stages: Sequence[dict[str, Any]]) -> Iterator[Column]:
    networks = {n: entry["network"] for stage in stages for n, entry in stage["features"].items()}
    for name, key in networks.items():
        yield Column(name, "lower", _frechet(name), _digits(3), "Fréchet distance of features")
        yield Column(
            f"distance, {key}",
            "lower",
            _feature_distance(name),
            _digits(4),
            "1 - cosine of the features of an image and its reconstruction",
        )


def _of_channels(stages: Sequence[dict[str, Any]]) -> Iterator[Column]:
    for channel in dict.fromkeys(b["channel"] for s in stages for b in s.get("bands", [])):
        yield Column(
            f"PSNR, channel {channel}", "higher", _band(channel, "psnr"), _digits(2, " dB"),
            "of the mean error over images",
        )  # fmt: skip
        yield Column(
            f"RMSE, channel {channel}", "lower", _band(channel, "rmse"), lambda v: f"{v:.4g}",
            "root of the mean squared error, in stored values (0 to 255 without a range)",
        )  # fmt: skip


# Below what they are made of.
_OF_IMAGES: tuple[Column, ...] = (
    Column("PSNR", "higher", _mean("psnr"), _digits(2, " dB"), "peak signal-to-noise ratio"),
    Column("SSIM", "higher", _mean("ssim"), _digits(4), "structural similarity"),
    Column("MS-SSIM", "higher", _mean("ms_ssim"), _digits(4), "SSIM at five scales"),
    Column("L1", "lower", _mean("l1"), _digits(4), "mean absolute error, values in [-1, 1]"),
    Column("LPIPS", "lower", _mean("lpips"), _digits(4), "AlexNet, version 0.1"),
    Column(
        "detail kept",
        "",
        lambda s: s["sharpness"]["high_frequency_kept"],
        lambda v: f"{v:.1%}",
        "energy finer than four pixels, reconstructions over originals; 100% is right",
    ),
    Column(
        "detail agreement",
        "higher",
        lambda s: s["sharpness"]["high_frequency_agreement"],
        lambda v: f"{v:.1%}",
        "correlation of that detail with the original's",
    ),
)
_OF_LATENTS: tuple[Column, ...] = (
    Column(
        "KL",
        "",
        lambda s: s["latent_health"]["kl"],
        lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}",
        "nats per image, from the posterior to a standard normal",
    ),
    Column(
        "active channels",
        "",
        lambda s: s["latent_health"]["active_channels"],
        lambda v: f"{v:.0f}",
        "of the latents: they carry signal",
    ),
    Column(
        "halved latents",
        "higher",
        _at("latent_health", "equivariance", "scale_0.5", "psnr_to_image"),
        _digits(2, " dB"),
        "PSNR of what halved latents decode to, against halved images: the higher, the more "
        "latents are like a small image, which a diffusion model learns more easily",
    ),
    Column(
        "latents' slope",
        "",
        _at("latent_health", "spectrum", "slope"),
        _digits(2),
        "how their energy falls with frequency, as a power of it; near 0 they are like noise, "
        "and the images' own is in the next row",
    ),
    Column(
        "images' slope",
        "",
        _at("sharpness", "slope"),
        _digits(2),
        "the same of the images",
    ),
    Column(
        "channel redundancy",
        "",
        _at("latent_health", "redundancy"),
        lambda v: f"{v:.0%}",
        "how far channels repeat each other: 0% are not correlated at all",
    ),
)
_OF_PROBES: tuple[Column, ...] = (
    Column(
        "flat colors",
        "lower",
        _at("flat", "off_mean"),
        lambda v: "0%" if v == 0 else f"{100 * v:.2g}%",
        "share of the energy of reconstructed flat colors that is off their mean: "
        "checkerboards, spots, borders",
    ),
    Column(
        "seams",
        "lower",
        _at("seams", "near"),
        lambda v: f"{v:.2g}",
        "of decoding in tiles: 8-bit levels (root mean square) from decoding whole, near them",
    ),
)
_OF_CODES: tuple[Column, ...] = (
    Column(
        "codes used",
        "higher",
        lambda s: s.get("codes", {}).get("used"),
        lambda v: f"{v:.1%}",
        "share of the codebook that these images use",
    ),
    Column(
        "code perplexity",
        "",
        lambda s: s.get("codes", {}).get("perplexity"),
        lambda v: f"{v:,.0f}",
        "how many equally frequent codes would be as hard to guess",
    ),
    Column(
        "most frequent code",
        "",
        lambda s: s.get("codes", {}).get("most_frequent"),
        lambda v: f"{v:.1%}",
        "its share of the tokens",
    ),
)
