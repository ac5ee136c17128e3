import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from first_stage.metrics.frechet import FrechetDistance, GaussianStatistics, frechet_distance


def statistics_of(features: torch.Tensor, batch: int) -> GaussianStatistics:
    result = GaussianStatistics(features.shape[1])
    for part in features.split(batch):
        result.update(part)
    return result


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 1000) -> GaussianStatistics:
    """Statistics with exactly this mean and covariance."""
    result = GaussianStatistics(len(mean))
    result.count = count
    result.mean = torch.from_numpy(mean)
    result.scatter = torch.from_numpy(covariance) * (count - 1)
    return result


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streamed_statistics_equal_numpy(batch) -> None:
    features = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        12, 12, generator=torch.Generator().manual_seed(1)
    )
    got = statistics_of(features, batch)
    np.testing.assert_allclose(got.mean.numpy(), features.double().mean(0).numpy(), atol=1e-12)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(got.covariance.numpy(), expected, atol=1e-11)


def test_a_large_mean_does_not_cancel() -> None:
    # The sum of squares minus the square of sums keeps no correct digit of this variance.
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() * 1e-3 + 1e6
    got = statistics_of(features, 13).covariance.numpy()
    np.testing.assert_allclose(got, np.cov(features.numpy(), rowvar=False), rtol=1e-5, atol=1e-12)


def test_closed_form_of_commuting_gaussians() -> None:
    # Diagonal covariances: |m|^2 + sum (sqrt(a) - sqrt(b))^2.
    m, a, b = np.array([0.3, -1.0, 2.0]), np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    got = frechet_distance(
        gaussian(np.zeros(3), turn @ np.diag(a) @ turn.T),
        gaussian(turn @ m, turn @ np.diag(b) @ turn.T),
    )
    assert got.value == pytest.approx((m**2).sum() + ((a**0.5 - b**0.5) ** 2).sum(), abs=1e-10)
    assert got.note == ""
    assert got.ranks == (3, 3)


def test_closed_form_of_general_gaussians() -> None:
    rng = np.random.default_rng(1)
    roots = rng.standard_normal((2, 6, 6))
    a, b = roots[0] @ roots[0].T, roots[1] @ roots[1].T
    mean = rng.standard_normal(6)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    got = frechet_distance(gaussian(np.zeros(6), a), gaussian(mean, b))
    assert got.value == pytest.approx(expected, rel=1e-9)


def test_same_statistics_have_no_distance() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    a, b = statistics_of(features, 50), statistics_of(features, 50)
    assert frechet_distance(a, b).value == pytest.approx(0.0, abs=1e-10)


def test_singular_covariance_says_so_and_is_exact() -> None:
    # Eleven images of rank 10 in 40 dimensions; the value is that of the 10 dimensions alone.
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 11, 10))
    plane, _ = np.linalg.qr(rng.standard_normal((40, 10)))
    small = [GaussianStatistics(10), GaussianStatistics(10)]
    large = [GaussianStatistics(40), GaussianStatistics(40)]
    for k, points in enumerate((x, y)):
        small[k].update(torch.from_numpy(points))
        large[k].update(torch.from_numpy(points @ plane.T))
    got = frechet_distance(*large)
    assert got.value == pytest.approx(frechet_distance(*small).value, rel=1e-9)
    assert got.ranks == (10, 10)
    assert "rank 10 and 10 in 40 dimensions" in got.note
    assert "(11 images)" in got.note
    assert "without regularisation" in got.note


def test_processes_add_up() -> None:
    features = torch.randn(90, 6, generator=torch.Generator().manual_seed(0)) + 3
    parts = [features[:17], features[17:80], features[80:80], features[80:]]
    statistics = [statistics_of(part, 16) if len(part) else GaussianStatistics(6) for part in parts]
    # What all-reduce does: every process's tensor is replaced by the sum over processes. The
    # tensors of a call have to be known before it, so the calls are replayed one after another.
    sums: list[torch.Tensor] = []
    while True:
        seen: list[list[torch.Tensor]] = []
        results = []
        for one in statistics:
            calls: list[torch.Tensor] = []

            def total(tensor, calls=calls):
                calls.append(tensor.clone())
                place = len(calls) - 1
                return sums[place].clone() if place < len(sums) else tensor

            results.append(one.merged(total))
            seen.append(calls)
        if len(sums) == len(seen[0]):
            break
        sums.append(torch.stack([calls[len(sums)] for calls in seen]).sum(0))
    whole = statistics_of(features, 90)
    for result in results:
        assert result.count == 90
        torch.testing.assert_close(result.mean, whole.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.scatter, whole.scatter, rtol=0, atol=1e-10)


def test_one_vector_and_different_lengths_are_refused() -> None:
    one = statistics_of(torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="4 and of 5"):
        frechet_distance(one, GaussianStatistics(5))


def test_result_names_dimensions() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    got = frechet_distance(statistics_of(features, 8), statistics_of(features + 1, 8))
    assert isinstance(got, FrechetDistance)
    assert got.dimensions == 5
    assert got.value == pytest.approx(5.0, abs=1e-5)
