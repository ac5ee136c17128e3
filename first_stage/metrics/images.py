"""Distances between an image and its reconstruction, one number per image.

Images are `(B, C, H, W)` float in [-1, 1]. Reported figures follow the 8-bit protocol: both sides
go through `eight_bit` (clamped, *rounded* to the 256 levels of an image file) before they are
compared, because that is what a reader of the files would see. Everything is computed in float64:
SSIM subtracts large squares from each other, and float32 leaves noise of 1e-4 in flat regions.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from first_stage.metrics.precision import in_float64

SSIM_SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels; its side is 11 pixels."""
SSIM_REACH = 5
"""Pixels from the window's centre to its edge."""
SSIM_K1, SSIM_K2 = 0.01, 0.03
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, Wang et al. 2003, section 3.2."""


def eight_bit(images: Tensor) -> Tensor:
    """Images as they would be read back from an 8-bit file: clamped and rounded.

    Args:
        images: `(B, C, H, W)` float in [-1, 1]; values outside are clamped.

    Returns:
        The same shape, float32, on the grid `k / 127.5 - 1` for whole k in 0..255.
    """
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)


def clamped(images: Tensor) -> Tensor:
    """Images as measurements of a stated range: clamped, at full precision.

    Args:
        images: `(B, C, H, W)` float in [-1, 1]; values outside are clamped.
    """
    return images.detach().float().clamp(-1, 1)


class BandErrors:
    """Errors of each channel, summed over images."""

    def __init__(self) -> None:
        self.images = 0
        self.squares = np.zeros(0)
        self.absolutes = np.zeros(0)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add images `(B, C, H, W)` in [-1, 1]; each counts alike, whatever its size."""
        difference = (in_float64(images) - in_float64(reconstructions)) / 2
        squares = difference.square().mean((2, 3)).sum(0).cpu().numpy()
        absolutes = difference.abs().mean((2, 3)).sum(0).cpu().numpy()
        self._add(len(images), squares, absolutes)

    def merge(self, other: "BandErrors") -> None:
        """Add what another process saw."""
        self._add(other.images, other.squares, other.absolutes)

    def _add(self, count: int, squares: np.ndarray, absolutes: np.ndarray) -> None:
        if count:
            self.squares = self.squares + squares if self.images else squares
            self.absolutes = self.absolutes + absolutes if self.images else absolutes
            self.images += count

    def summary(self) -> list[dict[str, Any]]:
        """For each channel `psnr` (dB, of the mean error; `None` for no error), `l1` on the
        [-1, 1] scale, and `rmse` as a share of the range."""
        return [
            {
                "psnr": -10 * math.log10(square) if square > 0 else None,
                "l1": 2 * absolute,
                "rmse": math.sqrt(square),
            }
            for square, absolute in zip(
                (self.squares / max(self.images, 1)).tolist(),
                (self.absolutes / max(self.images, 1)).tolist(),
                strict=True,
            )
        ]


def mean_squared_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error per image, averaged over channels and pixels, with values in [0, 1].

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape.

    Returns:
        `(B,)`, float64.
    """
    images, reconstructions = _unit_range(images, reconstructions)
    return (images - reconstructions).square().flatten(1).mean(1)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image: `10 log10(1 / MSE)` with values in [0, 1].

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape.

    Returns:
        `(B,)` in dB, float64; `inf` where both are identical (also for constant images), never NaN
        for finite input.
    """
    return -10.0 * torch.log10(mean_squared_error(images, reconstructions))


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error per image, averaged over channels and pixels, on the [-1, 1] scale.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape.

    Returns:
        `(B,)`, float64, in 0..2. Multiply by 127.5 for levels of an 8-bit file.
    """
    images, reconstructions = _unit_range(images, reconstructions)
    return 2.0 * (images - reconstructions).abs().flatten(1).mean(1)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity per image, averaged over channels and pixels.

    Wang et al. 2004, equation 13, with their Gaussian window (11 pixels, sigma 1.5), values in
    [0, 1], and the border mirrored, which is how `torchmetrics` computes it.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape.

    Returns:
        `(B,)`, float64, at most 1; exactly 1 for identical images.

    Raises:
        ValueError: When a side is below 6 pixels, where the mirrored border does not exist.
    """
    images, reconstructions = _unit_range(images, reconstructions)
    if not ssim_fits(*images.shape[-2:]):
        raise ValueError(
            f"SSIM needs sides of at least {SSIM_REACH + 1} pixels, got {tuple(images.shape[-2:])}"
        )
    return _ssim_map(images, reconstructions)[0].flatten(1).mean(1)


def ssim_fits(height: int, width: int) -> bool:
    """Whether images of this size have an SSIM."""
    return min(height, width) > SSIM_REACH


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Multi-scale structural similarity per image.

    Wang et al. 2003, equation 7: the contrast-structure term at five scales (each half the one
    before) and the luminance term at the coarsest, with negative terms set to zero so that the
    powers exist. Borders and averaging as in `torchmetrics`.

    Args:
        images: `(B, C, H, W)` in [-1, 1].
        reconstructions: The same shape.

    Returns:
        `(B,)`, float64, in 0..1.

    Raises:
        ValueError: When a side is below 176 pixels, where the window outgrows the coarsest scale.
    """
    images, reconstructions = _unit_range(images, reconstructions)
    if not ms_ssim_fits(*images.shape[-2:]):
        raise ValueError(f"MS-SSIM needs sides of at least 176 pixels, got {images.shape[-2:]}")
    result = torch.ones(len(images), dtype=images.dtype, device=images.device)
    inner = slice(SSIM_REACH, -SSIM_REACH)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        similarity, contrast = _ssim_map(images, reconstructions)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        term = similarity if last else contrast[..., inner, inner]
        result = result * term.flatten(1).mean(1).clamp_min(0.0) ** weight
        if not last:
            images, reconstructions = F.avg_pool2d(images, 2), F.avg_pool2d(reconstructions, 2)
    return result


def ms_ssim_fits(height: int, width: int) -> bool:
    """Whether images of this size have an MS-SSIM: the 11-pixel window at a sixteenth of them."""
    return min(height, width) // 2 ** (len(MS_SSIM_WEIGHTS) - 1) > 2 * SSIM_REACH


def _unit_range(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != reconstructions.shape or images.ndim != 4:
        raise ValueError(
            "images and reconstructions must both be (B, C, H, W), got "
            f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        )
    x, y = (in_float64(values).add(1.0).div(2.0) for values in (images, reconstructions))
    return x, y


def _ssim_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor at each pixel: two tensors `(B, C, H, W)`."""
    mean_x, mean_y, square_x, square_y, product = _blur(
        torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)
    ).unflatten(0, (5, len(x)))
    variance_x = (square_x - mean_x * mean_x).clamp_min(0.0)
    variance_y = (square_y - mean_y * mean_y).clamp_min(0.0)
    covariance = product - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    contrast = (2.0 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance * contrast, contrast


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window at each pixel of `(N, C, H, W)`, borders mirrored; one axis at a time."""
    taps = [math.exp(-0.5 * (d / SSIM_SIGMA) ** 2) for d in range(-SSIM_REACH, SSIM_REACH + 1)]
    total = sum(taps)
    x = F.pad(x, (SSIM_REACH,) * 4, mode="reflect")
    # Eleven shifted sums: ten times as fast as a convolution in float64.
    for axis in (-1, -2):
        size = x.shape[axis] - 2 * SSIM_REACH
        blurred = x.narrow(axis, 0, size) * (taps[0] / total)
        for place, tap in enumerate(taps[1:], start=1):
            blurred.add_(x.narrow(axis, place, size), alpha=tap / total)
        x = blurred
    return x
