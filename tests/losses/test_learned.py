"""Distances between feature maps, by hand."""

import pytest
import torch

from first_stage.losses.learned import (
    DISTANCES,
    feature_distances,
    feature_magnitudes,
    gram_distances,
    gram_matrix,
)


def maps(*values: float) -> torch.Tensor:
    """One image, two channels, places along the width."""
    return torch.tensor(values, dtype=torch.float64).view(1, 2, 1, -1)


def test_distances_by_hand():
    fake, real = maps(1, 2, 3, 4), maps(0, 2, 5, 0)  # differences 1, 0, -2, 4
    assert feature_distances([fake], [real], "l1").tolist() == [7 / 4]
    assert feature_distances([fake], [real], "l2").tolist() == [21 / 4]
    # places: (1, 3) with (0, 5), (2, 4) with (2, 0)
    cosines = 15 / (10**0.5 * 5), 4 / (20**0.5 * 2)
    expected = 1 - sum(cosines) / 2
    assert feature_distances([fake], [real], "cosine").item() == pytest.approx(expected)


def test_magnitudes_by_hand():
    real = maps(1, -2, 3, 4)
    assert feature_magnitudes([real], "l1").tolist() == [10 / 4]
    assert feature_magnitudes([real], "l2").tolist() == [30 / 4]
    assert feature_magnitudes([real], "cosine").tolist() == [1.0]


@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_inputs_give_exactly_0(distance):
    x = torch.randn(2, 3, 4, 4)
    fake = x.clone().requires_grad_()
    value = feature_distances([fake], [x], distance)
    assert value.item() == 0.0
    value.sum().backward()
    assert not fake.grad.any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_reals_are_detached_and_fakes_are_not(distance):
    real = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake = torch.randn(2, 3, 4, 4, requires_grad=True)
    feature_distances([fake], [real], distance).sum().backward()
    assert real.grad is None
    assert fake.grad.abs().max() > 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_by_finite_differences(distance):
    fake = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    real = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: feature_distances([f], [real], distance), (fake,))


def test_gram_matrices_by_hand():
    features = maps(1, 2, 3, 4)  # channels (1, 2) and (3, 4); C h w = 4
    expected = torch.tensor([[[5.0, 11.0], [11.0, 25.0]]], dtype=torch.float64) / 4
    torch.testing.assert_close(gram_matrix(features), expected)
    # The other has the channels (1, 0) and (0, 1): inner products 1, 0, 1
    difference = (4 / 4) ** 2 + 2 * (11 / 4) ** 2 + (24 / 4) ** 2
    found = gram_distances([features], [maps(1, 0, 0, 1)])
    assert found.item() == pytest.approx(difference)


def test_gram_gradient_by_finite_differences():
    fake = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    real = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: gram_distances([f], [real]), (fake,))
    gram_distances([fake], [real]).sum().backward()
    assert real.grad is None


def test_gram_matrices_do_not_depend_on_where():
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(gram_matrix(x), gram_matrix(x.roll(1, dims=-1)))
