import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure as torchmetrics_ms_ssim,
)
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import (
    structural_similarity_index_measure as torchmetrics_ssim,
)

from first_stage.data import images_from_pixels, open_image, open_source, pixels_of
from first_stage.metrics import images as metrics


def photos(side: int) -> torch.Tensor:
    """Centre crops of the built-in photos, `(6, 3, side, side)` in [-1, 1]."""
    source = open_source("photos")
    crops = []
    for index in range(len(source)):
        pixels = pixels_of(open_image(source.read(index).image, 3), 3)
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        crops.append(pixels[top : top + side, left : left + side])
    return images_from_pixels(torch.from_numpy(np.stack(crops)))


def damaged(images: torch.Tensor) -> torch.Tensor:
    """Noise and blur, different for each image, partly outside of [-1, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0.02, 0.5, len(images)).view(-1, 1, 1, 1)
    return torch.nn.functional.avg_pool2d(images, 3, 1, 1) + strength * noise


def unit(images: torch.Tensor) -> torch.Tensor:
    return images.double().add(1).div(2)


def test_eight_bit_rounds_and_clamps() -> None:
    level = 1 / 127.5
    images = torch.tensor([-1.7, -1.0, -1 + 0.49 * level, -1 + 0.51 * level, 0.999, 1.2])
    got = metrics.eight_bit(images.view(1, 1, 1, -1)).flatten()
    expected = torch.tensor([-1.0, -1.0, -1.0, -1 + level, 1.0, 1.0])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_eight_bit_keeps_what_a_file_holds() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    images = images_from_pixels(pixels)
    torch.testing.assert_close(metrics.eight_bit(images), images, atol=1e-6, rtol=0)


def test_hand_computed() -> None:
    images = torch.tensor([[[[-1.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    reconstructions = torch.tensor([[[[-1.0, 0.5], [0.5, 0.0]]], [[[0.2, 0.2], [0.2, 0.2]]]])
    # In [0, 1] the errors are 0, 1/4, 1/4, 0 and 1/10 everywhere.
    torch.testing.assert_close(
        metrics.psnr(images, reconstructions),
        torch.tensor([-10 * math.log10(2 / 16 / 4), 20.0], dtype=torch.float64),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        metrics.l1(images, reconstructions),
        torch.tensor([0.25, 0.2], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )


def test_ssim_of_constants_by_hand() -> None:
    # Without variance only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 0.25, 0.75, 0.01**2
    images = torch.full((1, 2, 8, 8), 2 * a - 1)
    reconstructions = torch.full((1, 2, 8, 8), 2 * b - 1)
    got = metrics.ssim(images, reconstructions).item()
    assert got == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.ms_ssim, metrics.l1])
def test_identical_and_constant_images_are_no_nan(metric) -> None:
    images = torch.cat([photos(192)[:1], torch.zeros(1, 3, 192, 192), -torch.ones(1, 3, 192, 192)])
    expected = {metrics.psnr: math.inf, metrics.l1: 0.0}.get(metric, 1.0)
    torch.testing.assert_close(
        metric(images, images), torch.full((3,), expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_equal_to_torchmetrics_on_photos() -> None:
    images = photos(192)
    reconstructions = metrics.eight_bit(damaged(images))
    x, y = unit(images), unit(reconstructions)
    each = [torchmetrics_psnr(b[None], a[None], data_range=1.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(
        metrics.psnr(images, reconstructions), torch.stack(each), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        metrics.ssim(images, reconstructions),
        torchmetrics_ssim(y, x, data_range=1.0, reduction="none"),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        metrics.ms_ssim(images, reconstructions),
        torchmetrics_ms_ssim(y, x, data_range=1.0, reduction="none"),
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        metrics.l1(images, reconstructions),
        2 * (x - y).abs().mean((1, 2, 3)),
        atol=1e-5,
        rtol=0,
    )


def test_one_image_does_not_touch_another() -> None:
    images = photos(32)
    reconstructions = damaged(images)
    for metric in (metrics.psnr, metrics.ssim, metrics.l1):
        alone = torch.cat(
            [metric(images[i : i + 1], reconstructions[i : i + 1]) for i in range(len(images))]
        )
        torch.testing.assert_close(metric(images, reconstructions), alone, rtol=0, atol=1e-12)


def test_sizes_that_do_not_fit() -> None:
    assert metrics.ms_ssim_fits(176, 500)
    assert not metrics.ms_ssim_fits(175, 500)
    assert metrics.ms_ssim(torch.zeros(1, 1, 176, 176), torch.ones(1, 1, 176, 176)).shape == (1,)
    with pytest.raises(ValueError, match="176"):
        metrics.ms_ssim(torch.zeros(1, 1, 175, 500), torch.zeros(1, 1, 175, 500))
    assert metrics.ssim_fits(6, 6)
    assert metrics.ssim(torch.zeros(1, 1, 6, 6), torch.ones(1, 1, 6, 6)).shape == (1,)
    with pytest.raises(ValueError, match="6 pixels"):
        metrics.ssim(torch.zeros(1, 1, 5, 9), torch.zeros(1, 1, 5, 9))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\) and \(1, 3, 8, 8\)"):
        metrics.psnr(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8))
