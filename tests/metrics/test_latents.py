import math

import numpy as np
import pytest
import torch
from scipy import stats

from first_stage.metrics.latents import HigherMoments, LatentHealth, equivariance, redundancy
from first_stage.metrics.spectrum import radial_frequency


def skewed(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 4, 4, generator=generator)
    x[:, 1] = x[:, 1].exp() * 2 + 5
    x[:, 2] = 0.01 * x[:, 2] ** 3 - 1
    return x


@pytest.mark.parametrize("split", [40, 7, 1])
def test_moments_equal_scipy_for_any_batches(split) -> None:
    x = skewed()
    moments = HigherMoments(3)
    for part in x.split(split):
        moments.update(part)
    flat = x.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(moments.mean, flat.mean(1), rtol=1e-12)
    np.testing.assert_allclose(moments.signal_variance, flat.var(1), rtol=1e-10)
    np.testing.assert_allclose(moments.excess_kurtosis, stats.kurtosis(flat, axis=1), rtol=1e-8)


def test_kl_and_noise_by_hand() -> None:
    # Two channels of 2 x 2; mean 1 and variance 1 give 0.5 nats a value, variance e^2 and mean 0
    # give (e^2 - 1 - 2) / 2.
    mean = torch.zeros(3, 2, 2, 2)
    mean[:, 0] = 1.0
    logvar = torch.zeros(3, 2, 2, 2)
    logvar[:, 1] = 2.0
    health = LatentHealth(2)
    health.update(mean, logvar)
    summary = health.summary()
    first, second = summary["channels"]
    assert first["kl"] == pytest.approx(4 * 0.5)
    assert second["kl"] == pytest.approx(4 * (math.exp(2) - 3) / 2)
    assert summary["kl"] == pytest.approx(first["kl"] + second["kl"])
    assert [first["noise_std"], second["noise_std"]] == pytest.approx([1.0, math.e])
    # Neither says anything about the image.
    assert summary["active_channels"] == 0


def test_active_channels_carry_more_than_noise() -> None:
    mean = skewed()
    mean[:, 2] = 0.05 * torch.randn(40, 4, 4, generator=torch.Generator().manual_seed(4))
    health = LatentHealth(3)
    health.update(mean, torch.zeros_like(mean))  # noise of variance 1
    assert [c["active"] for c in health.summary()["channels"]] == [True, True, False]
    # The same small signal is all there is when the posterior is narrow.
    health = LatentHealth(3)
    health.update(mean, torch.full_like(mean, math.log(1e-4)))
    summary = health.summary()
    assert summary["active_channels"] == 3
    assert summary["channels"][2]["signal_to_noise"] == pytest.approx(25.0, rel=0.2)


def test_without_a_posterior() -> None:
    mean = skewed()
    mean[:, 0] = 7.0
    health = LatentHealth(3)
    health.update(mean, None)
    summary = health.summary()
    assert summary["kl"] is None
    assert summary["posterior"] is False
    assert summary["channels"][0]["excess_kurtosis"] is None  # constant: no kurtosis, no NaN
    assert [c["active"] for c in summary["channels"]] == [False, True, True]
    assert all(c["kl"] is None and c["noise_std"] is None for c in summary["channels"])


def test_spectrum_of_noise_and_of_smooth_latents() -> None:
    noise = torch.randn(30, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    noise[:, 1] *= 100  # a loud channel does not outvote the other
    health = LatentHealth(2)
    health.update(noise, None)
    # Energy is spread evenly over coefficients: the share is that of their number.
    share = (radial_frequency(16, 16) >= 0.25).sum().item() / (16 * 16 - 1)
    assert health.summary()["spectrum"]["high_frequency_share"] == pytest.approx(share, abs=0.005)
    smooth = torch.nn.functional.interpolate(noise[..., :2, :2], (16, 16), mode="bicubic")
    health = LatentHealth(2)
    health.update(smooth, None)
    assert health.summary()["spectrum"]["high_frequency_share"] < 0.05


def test_parts_add_up() -> None:
    x = skewed()
    logvar = 0.1 * x
    whole, first, second = LatentHealth(3), LatentHealth(3), LatentHealth(3)
    whole.update(x, logvar)
    first.update(x[:11], logvar[:11])
    second.update(x[11:], logvar[11:])
    first.merge(second)
    first.merge(LatentHealth(3))  # a process without images
    a, b = first.summary(), whole.summary()
    for c, d in zip(a["channels"], b["channels"], strict=True):
        assert c == pytest.approx(d, rel=1e-9)
    assert a["kl"] == pytest.approx(b["kl"], rel=1e-12)
    assert a["spectrum"]["high_frequency_share"] == pytest.approx(
        b["spectrum"]["high_frequency_share"], rel=1e-9
    )


def test_a_pixelwise_decoder_is_equivariant() -> None:
    latents = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    found = equivariance(lambda z: 2 * z - 1, latents, 2 * latents - 1)
    for name in ("flip", "rotate_90", "scale_0.5"):
        to_image, change = found[name]
        assert to_image.max() < 1e-12, name
        assert change.max() < 1e-12, name


def test_a_decoder_that_knows_places_is_not() -> None:
    latents = torch.zeros(1, 1, 4, 4)
    ramp = torch.linspace(-1, 1, 4).expand(1, 1, 4, 4)
    found = equivariance(lambda z: ramp[..., : z.shape[-2], : z.shape[-1]], latents, latents)
    # Flipped, the ramp -1, -1/3, 1/3, 1 differs by 2, 2/3, 2/3, 2: in [0, 1] a mean square of 5/9.
    assert found["flip"][1].item() == pytest.approx(5 / 9)
    assert found["flip"][0].item() == pytest.approx((1 + 1 / 9) / 2 / 4)


def test_odd_latents_are_halved_rounded_down() -> None:
    latents = torch.rand(1, 1, 5, 7)
    found = equivariance(
        lambda z: torch.nn.functional.interpolate(z, scale_factor=2.0, mode="bilinear"),
        latents,
        torch.zeros(1, 1, 10, 14),
    )
    assert found["scale_0.5"][0].shape == (1,)
    assert found["scale_0.5"][0].isfinite().all()


def test_redundancy_by_hand() -> None:
    assert redundancy(np.diag([4.0, 0.01, 1.0])) == pytest.approx(0)
    same = np.outer([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert redundancy(same) == pytest.approx(1 - 1 / 4)
    # Correlation 0.6: eigenvalues 1.6 and 0.4, shares 0.8 and 0.2.
    half = np.array([[1.0, 0.6], [0.6, 1.0]])
    rank = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert redundancy(half) == pytest.approx(1 - rank / 2)
    with_dead = np.zeros((3, 3))
    with_dead[:2, :2] = half
    assert redundancy(with_dead) == pytest.approx(1 - rank / 2)
    assert redundancy(np.zeros((2, 2))) == 0


def test_what_predicts_diffusability_is_summed_over_parts() -> None:
    x = skewed()
    x[:, 2] = x[:, 0] * 3 + 0.01 * x[:, 2]
    whole, parts = LatentHealth(3), [LatentHealth(3) for _ in range(3)]
    whole.update(x, None)
    for part, some in zip(parts, x.split(15), strict=True):
        part.update(some, None)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    one, other = whole.summary(), parts[0].summary()
    assert other["redundancy"] == pytest.approx(one["redundancy"], rel=1e-9)
    rows = x.movedim(1, -1).reshape(-1, 3).double().numpy()
    assert one["redundancy"] == pytest.approx(redundancy(np.cov(rows.T)), rel=1e-9)
    shares = [c["variance_share"] for c in one["channels"]]
    assert shares == pytest.approx(rows.var(0) / rows.var(0).sum())
    assert sum(shares) == pytest.approx(1)
