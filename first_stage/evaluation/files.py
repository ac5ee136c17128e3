"""An evaluation as files: `metrics.json`, and the pictures that its report shows.

metrics.json     protocol, one entry per first stage, one row per image
pictures.json    which pictures belong together
pairs/           000-original.png, 000-reconstruction-0.png, 000-latents-0.png ...; of first stages
                 with codes also 000-tokens-0.png and codes-0.png; flat-0.png and seams-0.png,
                 the tests with flat colors and tiled decoding
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from first_stage.errors import UserError
from first_stage.evaluation.grids import save_png
from first_stage.evaluation.pictures import Pair
from first_stage.files import write_atomic, write_json

FORMAT = "first-stage evaluation 1"
METRICS = "metrics.json"
PICTURES = "pictures.json"


@dataclass
class Evaluation:
    """Results of an evaluation.

    Attributes:
        protocol: What was done to images and pixels, in words and numbers.
        first_stages: One entry per first stage, in the order given.
        pairs: Images for the report.
        codes: A picture of the codes for each first stage; `None` for one without.
        flat: A picture of the test with flat colors for each first stage.
        seams: A picture of the test of tiled decoding for each; `None` for one without.
        change: What `change.change_of` found of before and after; `None` where nothing was asked.
    """

    protocol: dict[str, Any]
    first_stages: list[dict[str, Any]]
    pairs: list[Pair] = field(default_factory=list)
    codes: list[Image.Image | None] = field(default_factory=list)
    flat: list[Image.Image | None] = field(default_factory=list)
    seams: list[Image.Image | None] = field(default_factory=list)
    change: dict[str, Any] | None = None


def save(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write an evaluation.

    Args:
        evaluation: The results.
        folder: Where to; made when it is not there. Earlier results in it are replaced.

    Returns:
        The path of `metrics.json`.
    """
    folder = Path(folder)
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    for old in (folder / "pairs").glob("*.png"):
        old.unlink()
    index = [_save_pair(folder, k, pair) for k, pair in enumerate(evaluation.pairs)]
    for name, pictures in (
        ("codes", evaluation.codes), ("flat", evaluation.flat), ("seams", evaluation.seams),
    ):  # fmt: skip
        for place, picture in enumerate(pictures):
            if picture is not None:
                save_png(picture, stage_picture(folder, name, place))
    write_json(folder / PICTURES, {"pairs": index}, indent=1)
    content = {
        "format": FORMAT,
        "protocol": evaluation.protocol,
        "first_stages": evaluation.first_stages,
    }
    if evaluation.change is not None:
        content["change"] = evaluation.change
    write_json(folder / METRICS, content, indent=1)
    return folder / METRICS


def is_evaluation(folder: str | Path) -> bool:
    """Whether a folder holds an evaluation."""
    return (Path(folder) / METRICS).is_file()


def load(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read an evaluation back.

    Args:
        folder: Where it was saved.

    Returns:
        The content of `metrics.json`, and the pairs: dictionaries with `id`, `index`, `cropped`,
        and the paths of `original`, `reconstructions`, `latents` and `tokens` (one per first stage;
        `None` for latents and tokens that are not shown).

    Raises:
        UserError: When it cannot be read.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        path = folder / PICTURES
        pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"] if path.exists() else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the evaluation in {str(folder)!r} cannot be read: {error}") from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{str(folder / METRICS)!r} has the format {content.get('format')!r}, not {FORMAT!r}: "
            "evaluate again"
        )
    return content, pairs


def stage_picture(folder: Path, name: str, place: int) -> Path:
    """Where a picture of a first stage lies, by its place among them.

    Args:
        folder: The evaluation's.
        name: `codes`, `flat` or `seams`.
        place: From 0.
    """
    return folder / "pairs" / f"{name}-{place}.png"


def _save_pair(folder: Path, number: int, pair: Pair) -> dict[str, Any]:
    def write(what: str, pixels: np.ndarray) -> str:
        path = f"pairs/{number:03d}-{what}.png"
        image = to_image(pixels)
        write_atomic(folder / path, lambda p: image.save(p, format="PNG", optimize=True))
        return path

    return {
        "id": pair.id,
        "index": pair.index,
        "cropped": pair.cropped,
        "width": pair.original.shape[1],
        "height": pair.original.shape[0],
        "original": write("original", pair.original),
        "reconstructions": [
            write(f"reconstruction-{k}", pixels) for k, pixels in enumerate(pair.reconstructions)
        ],
        "latents": [
            None
            if latents is None
            else {
                "channels": len(latents),
                "height": latents.shape[1],
                "width": latents.shape[2],
                "file": write(f"latents-{k}", latent_strip(latents)),
            }
            for k, latents in enumerate(pair.latents)
        ],
        "tokens": [
            None if colors is None else write(f"tokens-{k}", colors)
            for k, colors in enumerate(pair.tokens)
        ],
    }


def latent_strip(latents: np.ndarray) -> np.ndarray:
    """Channels side by side as one gray picture, each spread over its own range.

    Args:
        latents: `(C, h, w)`.

    Returns:
        `(h, C * w, 1)` uint8; a channel's mean is middle gray, three standard deviations are black
        and white.
    """
    mean = latents.mean((1, 2), keepdims=True)
    std = latents.std((1, 2), keepdims=True)
    gray = 127.5 + 127.5 * (latents - mean) / np.maximum(3 * std, 1e-12)
    strip = np.concatenate(list(gray), axis=1)
    return np.clip(np.rint(strip), 0, 255).astype(np.uint8)[..., None]


def to_image(pixels: np.ndarray) -> Image.Image:
    """A picture of pixels `(H, W, C)` uint8 with 1, 3 or 4 channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
