"""Each pair against its paper's formula, by numbers computed by hand."""

import math

import pytest
import torch

from first_stage.losses.adversarial import PAIRS

REALS = torch.tensor([2.0, 0.5, -1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 2)
FAKES = torch.tensor([-3.0, 0.5, 1.0, -0.5], dtype=torch.float64).view(2, 1, 1, 2)


def s(t: float) -> float:
    """softplus"""
    return math.log1p(math.exp(t))


CRITIC = {
    # reals: max(0, 1 - x) = 0, 0.5, 2, 1; fakes: max(0, 1 + x) = 0, 1.5, 2, 0.5
    "hinge": 3.5 / 4 + 4.0 / 4,
    # mean of fakes -0.5, mean of reals 0.375
    "wasserstein": -0.5 - 0.375,
    "logistic": (s(-2) + s(-0.5) + s(1) + s(0)) / 4 + (s(-3) + s(0.5) + s(1) + s(-0.5)) / 4,
    # reals: (x - 1)^2 = 1, 0.25, 4, 1; fakes: x^2 = 9, 0.25, 1, 0.25
    "least_squares": 0.5 * (6.25 / 4) + 0.5 * (10.5 / 4),
    # real - fake: 5, 0, -2, 0.5
    "relativistic": (s(-5) + s(0) + s(2) + s(-0.5)) / 4,
}
GENERATOR = {
    "hinge": 0.5,
    "wasserstein": 0.5,
    "logistic": (s(3) + s(-0.5) + s(-1) + s(0.5)) / 4,
    # (x - 1)^2 = 16, 0.25, 0, 2.25
    "least_squares": 0.5 * 18.5 / 4,
    "relativistic": (s(5) + s(0) + s(-2) + s(0.5)) / 4,
}
# d(generator loss)/d(logit) of one logit at -6, the real's at 1
SLOPE = {
    "hinge": -1.0,
    "wasserstein": -1.0,
    "logistic": -1 / (1 + math.exp(-6)),
    "least_squares": -7.0,
    "relativistic": -1 / (1 + math.exp(-7)),
}


def test_every_pair_is_covered_here():
    assert set(PAIRS) == set(CRITIC) == set(GENERATOR) == set(SLOPE)


@pytest.mark.parametrize("kind", PAIRS)
def test_both_losses_by_hand(kind):
    pair = PAIRS[kind]
    assert pair.critic(REALS, FAKES).item() == pytest.approx(CRITIC[kind], abs=1e-12)
    assert pair.generator(REALS, FAKES).item() == pytest.approx(GENERATOR[kind], abs=1e-12)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_generators_gradient_does_not_vanish_where_the_critic_is_sure(kind):
    # A loss after tanh or a sigmoid gives 2e-5 or 2e-3 here, a saturating one likewise.
    count = 5
    fakes = torch.full((count, 1, 1, 1), -6.0, dtype=torch.float64, requires_grad=True)
    PAIRS[kind].generator(torch.ones(count, 1, 1, 1, dtype=torch.float64), fakes).backward()
    expected = torch.full_like(fakes, SLOPE[kind] / count)
    torch.testing.assert_close(fakes.grad, expected)


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_by_finite_differences(kind):
    # Away from the hinge's corners at +-1.
    reals = (REALS + 0.013).requires_grad_()
    fakes = (FAKES + 0.013).requires_grad_()
    assert torch.autograd.gradcheck(PAIRS[kind].critic, (reals, fakes))
    assert torch.autograd.gradcheck(lambda f: PAIRS[kind].generator(reals.detach(), f), (fakes,))


@pytest.mark.parametrize("kind", PAIRS)
def test_the_players_pull_the_fakes_in_opposite_directions(kind):
    # A generator loss from another paper, or a wrong sign, would not.
    fakes = torch.full((1, 1, 1, 1), 0.3, requires_grad=True)
    reals = torch.full((1, 1, 1, 1), 0.4)
    (of_critic,) = torch.autograd.grad(PAIRS[kind].critic(reals, fakes), fakes)
    (of_generator,) = torch.autograd.grad(PAIRS[kind].generator(reals, fakes), fakes)
    assert of_critic > 0 > of_generator
