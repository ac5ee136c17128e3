import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from first_stage.metrics import spectrum
from first_stage.metrics.spectrum import (
    SharpnessSums,
    cosine_transform,
    mean_energy,
    ring_centres,
    ring_energy,
    slope,
)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (7, 5), (16, 9)])
def test_transform_equals_scipy(shape) -> None:
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    expected = dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(spectrum.cosine_transform(x).numpy(), expected, atol=1e-12)


def test_parseval() -> None:
    x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    energy = spectrum.cosine_transform(x).square().sum((-1, -2))
    torch.testing.assert_close(energy, x.double().square().sum((-1, -2)))


def wave(u: int, v: int, side: int = 32) -> torch.Tensor:
    """A cosine of `u / 2 side` and `v / 2 side` cycles per pixel, `(1, 1, side, side)`."""
    t = (torch.arange(side, dtype=torch.float64) + 0.5) * math.pi / side
    return torch.outer(torch.cos(u * t), torch.cos(v * t))[None, None]


def test_a_wave_lies_in_its_ring() -> None:
    # 10 and 0 half waves over 32 pixels: 10 / 64 cycles per pixel, ring 10 / 64 / (0.5 / 32) = 10.
    energy, count = spectrum.ring_energy(spectrum.cosine_transform(wave(10, 0)).square())
    assert int(energy[0, 0].argmax()) == 10
    assert energy[0, 0, 10] == pytest.approx(32 * 32 / 2)
    assert energy.sum() == pytest.approx(32 * 32 / 2)
    assert count[0] == 0  # nothing but the mean lies there
    # Every coefficient but the mean and those in the corners is in a ring.
    inside = (spectrum.radial_frequency(32, 32) < 0.5).sum() - 1
    assert count.sum() == inside


def test_white_noise_is_flat() -> None:
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    energy, count = spectrum.ring_energy(spectrum.cosine_transform(x).square())
    per_coefficient = (energy.mean((0, 1)) / count)[4:]
    assert per_coefficient.min() > 0.85
    assert per_coefficient.max() < 1.15


def test_high_frequencies_lost_kept_and_wrong() -> None:
    low, high, other = wave(3, 2), wave(25, 4), wave(4, 25)
    original = 0.3 * low + 0.2 * high
    sums = SharpnessSums()
    kept, agreement = sums.update(
        torch.cat([original] * 4),
        # whole, blurred, half the amplitude, other detail of the same energy
        torch.cat([original, 0.3 * low, 0.3 * low + 0.1 * high, 0.3 * low + 0.2 * other]),
    )
    assert kept.tolist() == pytest.approx([1.0, 0.0, 0.25, 1.0], abs=1e-9)
    assert agreement[[0, 2, 3]].tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-9)
    summary = sums.summary()
    assert summary["high_frequency_kept"] == pytest.approx(2.25 / 4)


def test_constant_images_have_no_share_to_keep() -> None:
    sums = SharpnessSums()
    kept, agreement = sums.update(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    assert kept.isnan().all()
    assert agreement.isnan().all()
    assert sums.summary()["high_frequency_kept"] is None
    assert sums.summary()["high_frequency_agreement"] is None


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 6, 2, 16, 16, generator=generator)
    whole, first, second = SharpnessSums(), SharpnessSums(), SharpnessSums()
    whole.update(x, y)
    first.update(x[:2], y[:2])
    second.update(x[2:], y[2:])
    first.merge(second)
    for name in ("original", "reconstruction", "count", "high"):
        np.testing.assert_allclose(getattr(first, name), getattr(whole, name), rtol=1e-12)


def test_tiny_images_leave_rings_empty() -> None:
    energy, count = spectrum.ring_energy(torch.ones(1, 1, 2, 2))
    assert count.sum() == 3  # (0, 1) and (1, 0) at 0.25; (1, 1) at 0.35
    assert spectrum.mean_energy(energy[0, 0].numpy(), count.numpy()).count(None) == 30


def test_mean_energy_of_an_empty_ring_is_none() -> None:
    assert spectrum.mean_energy(np.array([2.0, 0.0]), np.array([4, 0])) == [0.5, None]


def test_a_low_pass_keeps_waves_below_the_cutoff_and_no_others() -> None:
    low, high = wave(5, 4), wave(9, 12)  # 0.1 and 0.23 cycles per pixel
    for cutoff, expected in ((0.05, 0 * low), (0.15, low), (0.25, low + high)):
        found = spectrum.low_pass(low + high, cutoff)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_low_pass_is_a_projection_at_any_shape_and_keeps_constants() -> None:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 12, 20, generator=draw, dtype=torch.float64, requires_grad=True)
    once = spectrum.low_pass(x, 0.2)
    torch.testing.assert_close(spectrum.low_pass(once, 0.2), once)
    torch.testing.assert_close(spectrum.low_pass(x + 3.0, 0.2), once + 3.0)
    assert spectrum.low_pass(x.float(), 0.2).dtype == torch.float32
    # The gradient has nothing of what was taken away either, by the transform of another module.
    (gradient,) = torch.autograd.grad(once.square().sum(), x)
    coefficients = dctn(gradient.numpy(), axes=(-2, -1), norm="ortho")
    beyond = (spectrum.radial_frequency(12, 20) >= 0.2).numpy()
    assert abs(coefficients[..., beyond]).max() < 1e-12
    expected = 2 * dctn(x.detach().numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(coefficients[..., ~beyond], expected[..., ~beyond], atol=1e-12)


def test_the_slope_of_a_power_law_is_its_exponent():
    frequency = ring_centres()
    for exponent in (-2.0, 0.0, 0.7):
        energy = [7.0 * f**exponent for f in frequency]
        assert slope(frequency, energy) == pytest.approx(exponent)
    assert slope(frequency, [None, *energy[1:]]) == pytest.approx(0.7)
    assert slope(frequency[:3], [1.0, None, 2.0]) is None


def test_noise_is_flat_and_its_running_sum_is_not():
    noise = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for x in (noise, noise.cumsum(-1).cumsum(-2)):
        rings, count = ring_energy(cosine_transform(x).square())
        found.append(slope(ring_centres(), mean_energy(rings.mean((0, 1)).numpy(), count.numpy())))
    assert found[0] == pytest.approx(0, abs=0.05)
    assert found[1] < -1
