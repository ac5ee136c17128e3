"""Penalties on critics whose slopes are known."""

import pytest
import torch
from torch import nn

from first_stage.config.losses import AdversarialConfig
from first_stage.losses import penalties as regularisers
from first_stage.losses.critic_loss import CriticLoss
from first_stage.losses.lagged_means import LaggedMeans


class Linear(nn.Module):
    """D(x) = w . x, alike in two patches: the slope is w wherever it is measured."""

    def __init__(self, weight: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64).view(1, 1, 1, -1))
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        value = (images * self.weight).sum((1, 2, 3), keepdim=True)
        return value.expand(-1, 1, 1, 2)


def images(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 1, 1, -1)


def test_the_gradient_penalty_by_hand():
    # |w| = 5, so (5 - 1)^2, whatever the images.
    judge = Linear([3.0, 4.0])
    penalty = regularisers.gradient_penalty(
        judge, images([1, 2]), images([0, 0]), torch.tensor([0.25], dtype=torch.float64)
    )
    assert penalty.item() == pytest.approx(16.0)
    (gradient,) = torch.autograd.grad(penalty, judge.weight)
    # d/dw (|w| - 1)^2 = 2 (|w| - 1) w / |w| = 8 * (0.6, 0.8)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([4.8, 6.4], dtype=torch.float64))


def test_the_gradient_penalty_is_taken_between_reals_and_fakes():
    judge = Linear([1.0, 0.0])
    reals, fakes = images([1, 2], [4, 0]), images([0, 0], [0, 8])
    mix = torch.tensor([0.25, 0.5], dtype=torch.float64)
    regularisers.gradient_penalty(judge, reals, fakes, mix)
    # 0.25 of the first real; the middle of the second pair: neither reals nor fakes.
    torch.testing.assert_close(judge.seen[0], images([0.25, 0.5], [2, 4]))


def test_zero_centred_penalties_by_hand():
    judge = Linear([3.0, 4.0])
    x = images([1, 2], [5, 6])
    assert regularisers.zero_centered_penalty(judge, x).item() == pytest.approx(12.5)  # 25 / 2
    torch.testing.assert_close(judge.seen[0], x)


def test_r1_is_taken_on_reals_and_r2_on_fakes():
    critic = CriticLoss(AdversarialConfig(r1=0.5, r2=0.25, penalty_every=1), LaggedMeans(0.0))
    reals, fakes = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 3.0)
    total, log = critic.penalty(torch.square, reals, fakes, torch.zeros(2))
    # D(x) = x^2, whose slope is 2 x: (2 * 1)^2 / 2 and (2 * 3)^2 / 2.
    assert {name: value.item() for name, value in log.items()} == {
        "penalty/r1": 2.0, "penalty/r2": 18.0,
    }  # fmt: skip
    assert total.item() == 0.5 * 2.0 + 0.25 * 18.0


def test_a_penalty_depends_neither_on_the_batch_nor_on_the_number_of_patches():
    judge = Linear([3.0, 4.0])
    once = regularisers.zero_centered_penalty(judge, images([1, 2]))
    thrice = regularisers.zero_centered_penalty(judge, images([1, 2], [1, 2], [1, 2]))
    assert once.item() == pytest.approx(thrice.item())


@pytest.mark.parametrize("name", ["gradient_penalty", "zero_centred"])
def test_penalties_reach_the_critics_weights_by_finite_differences(name):
    torch.manual_seed(0)
    # Smooth: a leaky ReLU's slope jumps, and a difference across the jump is no gradient.
    judge = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3)).double()
    x, y = torch.randn(2, 2, 2, 6, 6, dtype=torch.float64)
    mix = torch.tensor([0.3, 0.6], dtype=torch.float64)

    def penalty(*weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(judge.named_parameters()), weights, strict=True))

        def run(images):
            return torch.func.functional_call(judge, named, (images,))

        if name == "zero_centred":
            return regularisers.zero_centered_penalty(run, x)
        return regularisers.gradient_penalty(run, x, y, mix)

    assert torch.autograd.gradcheck(penalty, tuple(judge.parameters()))


def test_lecam_by_hand():
    reals, fakes = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    # anchors: reals 2, fakes -1. Reals to -1: 4, 16; fakes to 2: 16, 4.
    value = regularisers.lecam(reals, fakes, torch.tensor(2.0), torch.tensor(-1.0))
    assert value.item() == pytest.approx(10.0 + 10.0)


def test_lecams_gradient_by_finite_differences():
    reals = torch.randn(3, dtype=torch.float64, requires_grad=True)
    fakes = torch.randn(3, dtype=torch.float64, requires_grad=True)
    anchors = torch.tensor([0.4, -0.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r, f: regularisers.lecam(r, f, anchors[0], anchors[1]), (reals, fakes)
    )


def test_clipping_weights():
    critic = Linear([3.0, -0.004])
    regularisers.clip_weights(critic.parameters(), 0.01)
    assert critic.weight.flatten().tolist() == [0.01, -0.004]
