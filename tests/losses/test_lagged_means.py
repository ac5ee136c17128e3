"""Means of earlier steps: what is not finite does not enter them."""

import pytest
import torch

from first_stage.losses.lagged_means import LaggedMeans


def steps(*values: float) -> LaggedMeans:
    means = LaggedMeans(0.5)
    for value in values:
        means.observe("x", torch.tensor([value, 1.0]))
        means.observe("y", torch.tensor(3.0))
        means.finish_step(lambda tensor: tensor)
    return means


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_value_that_is_not_finite_is_skipped(bad, place):
    good = [2.0, 4.0]
    expected = steps(*good).get("x")
    found = steps(*good[:place], bad, *good[place:]).get("x")
    assert torch.equal(found, expected)
    assert torch.equal(steps(*good, bad).get("y"), torch.tensor(3.0))  # others go on


def test_nothing_is_known_until_something_finite_was_seen():
    assert steps(float("inf")).get("x") is None
