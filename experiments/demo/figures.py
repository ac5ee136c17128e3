"""Three figures of a first stage on the held-out photos: fidelity, colour cast, detail kept.

PSNR alone is best for a blur, and detail alone for noise; a cast is what a person sees first, and
neither of the two shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from first_stage.config.parsing import read_options
from first_stage.data import View, fixed_images, images_from_pixels, open_source
from first_stage.errors import ConfigError
from first_stage.metrics.images import eight_bit, psnr
from first_stage.metrics.spectrum import cosine_transform, high_frequency
from first_stage.models.loading import load_autoencoder

_BARS = {"PSNR": 26.5, "colour error": 4.0, "detail": (0.4, 1.0)}
"""What the demo is to reach: at least, at most, and between."""


@dataclass(frozen=True)
class DataOptions:
    """Which photos."""

    path: str = "photos"
    """As in training; of a built-in set the held-out ones."""
    resolution: int = 256
    """Side of the centre crop, in pixels."""
    images: int = 64
    """How many at most."""


@dataclass(frozen=True)
class Options:
    """Measure a first stage on the held-out photos: PSNR, colour cast, detail kept."""

    first_stage: str = ""
    """The folder of an export."""
    data: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class Figures:
    """Of one photo.

    Attributes:
        psnr: In dB, of values rounded to 8 bits.
        cast: Mean over pixels of the signed error, per channel, in steps of 8 bits.
        detail: Energy at 0.25 cycles per pixel and above, reconstruction over original.
    """

    psnr: float
    cast: tuple[float, ...]
    detail: float


def figures(images: Tensor, reconstructions: Tensor) -> list[Figures]:
    """The three figures of each image.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape and range.
    """
    images, reconstructions = eight_bit(images), eight_bit(reconstructions)
    fidelity = psnr(images, reconstructions)
    cast = (reconstructions - images).mean((-2, -1)) * 127.5
    energy = [
        high_frequency(cosine_transform(x)).square().sum((-2, -1))
        for x in (images, reconstructions)
    ]
    return [
        Figures(float(fidelity[i]), tuple(cast[i].tolist()), float(energy[1][i] / energy[0][i]))
        for i in range(len(images))
    ]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a row per photo and the three bars."""
    options = read_options(Options, arguments)
    if not options.first_stage:
        raise ConfigError("--first_stage is missing: the folder of an export")
    vae = load_autoencoder(options.first_stage).eval()
    side = options.data.resolution
    source = open_source(options.data.path, split="validation")
    found = fixed_images(
        source, View(side, side), vae.config.in_channels, options.data.images, seed=0
    )
    images = images_from_pixels(found.pixels)
    latents = vae.encode(images).latent_dist.mode()
    rows = figures(images, vae.decode(latents).sample)
    print("photo                 PSNR    signed colour error        detail kept")
    for name, row in zip(found.ids, rows, strict=True):
        cast = " ".join(f"{value:+6.2f}" for value in row.cast)
        print(f"{name:<20} {row.psnr:6.2f}    {cast:<24} {row.detail:10.1%}")
    mean = sum(row.psnr for row in rows) / len(rows)
    worst = max(abs(value) for row in rows for value in row.cast)
    least, most = (f(row.detail for row in rows) for f in (min, max))
    print(
        f"mean PSNR {mean:.2f} dB (bar: {_BARS['PSNR']}), largest colour error {worst:.2f} of 255 "
        f"(bar: {_BARS['colour error']:.0f}), detail {least:.0%} to {most:.0%} (bar: 40% to 100%)"
    )
