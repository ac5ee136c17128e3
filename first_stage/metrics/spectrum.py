"""Energy by spatial frequency, radially averaged: what blur takes away is seen here.

Energies are squares of orthonormal DCT-II coefficients. The cosine transform continues an image by
its mirror, so the jump between opposite borders, which a Fourier transform reports as fine detail,
does not count; and by Parseval the energies of an image add up to the sum of its squared values.
Frequencies are in cycles per pixel; 0.5 is the finest a row of pixels can hold, and the diagonal
reaches 0.71. The mean (frequency 0) is left out everywhere.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from first_stage.metrics.precision import full_float32, in_float64

BINS = 32
"""Rings of equal width from 0 to 0.5 cycles per pixel."""
HIGH = 0.25
"""Where high frequencies begin, in cycles per pixel: detail finer than four pixels."""


def cosine_transform(x: Tensor) -> Tensor:
    """Orthonormal two-dimensional DCT-II over the last two axes.

    Args:
        x: `(..., H, W)` float.

    Returns:
        Coefficients of the same shape, float64; index `(u, v)` has the frequencies `u / 2H`
        and `v / 2W` cycles per pixel.
    """
    return _cosine_transform_last(_cosine_transform_last(in_float64(x)).mT).mT


def _cosine_transform_last(x: Tensor) -> Tensor:
    """One axis through an FFT of the same length (Makhoul 1980, equations 8 to 11)."""
    n = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    angle = -math.pi * k / (2 * n)
    scale = torch.full_like(k, math.sqrt(2.0 / n))
    scale[0] = math.sqrt(1.0 / n)
    return (spectrum.real * angle.cos() - spectrum.imag * angle.sin()) * scale


def radial_frequency(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Frequency of each coefficient, `(H, W)` float64 in cycles per pixel."""
    u = torch.arange(height, dtype=torch.float64, device=device) / (2 * height)
    v = torch.arange(width, dtype=torch.float64, device=device) / (2 * width)
    return torch.sqrt(u[:, None] ** 2 + v[None, :] ** 2)


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """The part of images below a frequency; differentiable.

    An orthogonal projection: done twice it changes nothing more, and it leaves no gradient in what
    it takes away.

    Args:
        images: `(..., H, W)` float.
        cutoff: In cycles per pixel; what lies at it or above, in any direction, is taken away.

    Returns:
        The same shape, type and device.
    """
    filtered: Tensor = _LowPass.apply(images, cutoff)  # type: ignore[no-untyped-call]
    return filtered


class _LowPass(torch.autograd.Function):
    """The projection, in full float32; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, cutoff: float) -> Tensor:
        ctx.cutoff = cutoff
        return _projected(images, cutoff)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return low_pass(gradients[0], ctx.cutoff), None


def _projected(images: Tensor, cutoff: float) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = (_cosines(n, images.dtype, images.device) for n in (height, width))
    kept = _below(height, width, cutoff, images.device)
    with full_float32():
        return rows @ ((rows.mT @ images @ columns) * kept) @ columns.mT


def coefficients(images: Tensor) -> Tensor:
    """The same as `cosine_transform` in the type of the images; differentiable."""
    rows, columns = (_cosines(n, images.dtype, images.device) for n in images.shape[-2:])
    with full_float32():
        return rows.mT @ images @ columns


@functools.lru_cache(maxsize=16)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The DCT-II as a matrix `(n, n)`: its columns are the orthonormal cosines."""
    return _cosine_transform_last(torch.eye(n, dtype=torch.float64)).to(device, dtype)


@functools.lru_cache(maxsize=16)
def _below(height: int, width: int, cutoff: float, device: torch.device) -> Tensor:
    """Which coefficients lie below a frequency, `(H, W)` bool."""
    return (radial_frequency(height, width) < cutoff).to(device)


def ring_energy(energy: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """Energy per ring of frequencies, without the mean.

    Args:
        energy: `(..., H, W)`, squared coefficients.
        bins: Rings from 0 to 0.5 cycles per pixel; what lies beyond, in the corners, is left out.

    Returns:
        Sum of the energies in each ring `(..., bins)`, and the number of coefficients in it
        `(bins,)`, 0 where an image is too small to have any.
    """
    frequency = radial_frequency(energy.shape[-2], energy.shape[-1], energy.device)
    ring = (frequency * 2 * bins).floor().long().clamp_max(bins)
    ring[0, 0] = bins  # the mean goes to the bin that is dropped
    sums = energy.new_zeros(*energy.shape[:-2], bins + 1)
    sums.index_add_(-1, ring.flatten(), energy.flatten(-2))
    counts = torch.bincount(ring.flatten(), minlength=bins + 1)
    return sums[..., :bins], counts[:bins]


def high_frequency(coefficients: Tensor) -> Tensor:
    """Coefficients at or above `HIGH`, flattened: `(..., n)`."""
    height, width = coefficients.shape[-2:]
    mask = radial_frequency(height, width, coefficients.device) >= HIGH
    return coefficients[..., mask]


def ring_centres(bins: int = BINS) -> list[float]:
    """Middle frequency of each ring, in cycles per pixel."""
    return [(k + 0.5) * 0.5 / bins for k in range(bins)]


class SharpnessSums:
    """Spectra of originals and reconstructions, summed over images.

    Sums of different parts of a data set add up, so that they can be made on several processes.

    Attributes:
        original: `(BINS,)` float64, energy per ring of the originals, values in [-1, 1].
        reconstruction: The same of the reconstructions.
        count: Coefficients per ring.
        high: Energy of the originals at high frequencies, of the reconstructions, and their inner
            product: `(3,)`.
    """

    def __init__(self) -> None:
        self.original = np.zeros(BINS)
        self.reconstruction = np.zeros(BINS)
        self.count = np.zeros(BINS)
        self.high = np.zeros(3)

    def update(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            reconstructions: The same shape.

        Returns:
            For each image the share of its high-frequency energy that its reconstruction has,
            `(B,)`, NaN where the original has no more than rounding to 8 bits leaves; and how well
            the two agree there: the correlation of their coefficients, `(B,)`.
        """
        x, y = cosine_transform(images), cosine_transform(reconstructions)
        for total, coefficients in ((self.original, x), (self.reconstruction, y)):
            energy, count = ring_energy(coefficients.square())
            total += energy.sum((0, 1)).cpu().numpy()
        self.count += (count * x.shape[0] * x.shape[1]).cpu().numpy()
        x_high, y_high = high_frequency(x).flatten(1), high_frequency(y).flatten(1)
        parts = torch.stack(
            [x_high.square().sum(1), y_high.square().sum(1), (x_high * y_high).sum(1)]
        )
        self.high += parts.sum(1).cpu().numpy()
        # Rounding to levels of 2/255 leaves noise of a twelfth of their square per coefficient.
        floor = x_high.shape[1] * (1 / 127.5) ** 2 / 12
        energy_x, energy_y, product = parts
        nothing = torch.full_like(energy_x, math.nan)
        kept = torch.where(energy_x > floor, energy_y / energy_x, nothing)
        both = (energy_x > floor) & (energy_y > 0)
        agreement = torch.where(both, product / torch.sqrt(energy_x * energy_y), nothing)
        return kept, agreement

    def merge(self, other: "SharpnessSums") -> None:
        """Add the sums of other images."""
        self.original += other.original
        self.reconstruction += other.reconstruction
        self.count += other.count
        self.high += other.high

    def summary(self) -> dict[str, object]:
        """Over all images: energies per coefficient by frequency, the share kept, the agreement.

        Returns:
            `frequency` (cycles per pixel), `original` and `reconstruction` (mean energy per
            coefficient; `None` in rings that no image reaches), `slope` of the originals,
            `high_frequency_kept` and
            `high_frequency_agreement` (`None` where the originals have no energy there).
        """
        energy_x, energy_y, product = (float(v) for v in self.high)
        both = math.sqrt(energy_x * energy_y)
        return {
            "frequency": ring_centres(),
            "original": mean_energy(self.original, self.count),
            "reconstruction": mean_energy(self.reconstruction, self.count),
            "slope": slope(ring_centres(), mean_energy(self.original, self.count)),
            "high_frequency_kept": energy_y / energy_x if energy_x > 0 else None,
            "high_frequency_agreement": product / both if both > 0 else None,
        }


def mean_energy(total: np.ndarray, count: np.ndarray) -> list[float | None]:
    """Energy per coefficient; `None` where there is none."""
    pairs = zip(total.tolist(), count.tolist(), strict=True)
    return [t / c if c > 0 else None for t, c in pairs]


def slope(frequency: Sequence[float], energy: Sequence[float | None]) -> float | None:
    """How energy changes with frequency: the exponent a of the power law f^a that fits best.

    About -2 in photos, 0 in white noise. A line through the logarithms by least squares, in which
    every octave counts alike: a ring counts as the inverse of its frequency.

    Args:
        frequency: Of each ring, above 0.
        energy: Per coefficient; rings without any are left out.

    Returns:
        `None` with fewer than three rings.
    """
    found = [(f, e) for f, e in zip(frequency, energy, strict=True) if e is not None and e > 0]
    if len(found) < 3:
        return None
    x, y = (np.log([pair[k] for pair in found]) for k in (0, 1))
    weights = [1 / math.sqrt(f) for f, _ in found]
    return float(np.polyfit(x, y, 1, w=weights)[0])
