"""The objective's terms: by hand, by finite differences, and by whom their gradients reach."""

import math
from dataclasses import replace

import pytest
import torch

from first_stage.config.schema import AdversarialConfig, LearnedConfig, LossConfig
from first_stage.losses.objective import Objective
from first_stage.losses.pixel import pixel_error
from first_stage.losses.terms import CriticOutputs, Inputs, schedule
from first_stage.metrics.latents import kl_divergence
from first_stage.models.bottlenecks import Code, Gaussian
from first_stage.models.codebooks import Codebook
from first_stage.models.critic import CriticOutput

NO_CRITIC = {
    "learned": LearnedConfig(weight=0.0),
    "adversarial": AdversarialConfig(weight=0.0),
}


def one(value: torch.Tensor) -> torch.Tensor:
    return value


def outputs_of(*logits: float, count: int = 2) -> CriticOutputs:
    """A critic's logits on `count` reals, and on any number of fakes."""
    reals = torch.tensor(logits[:count]).view(-1, 1, 1, 1).requires_grad_()
    fakes = torch.tensor(logits[count:]).view(-1, 1, 1, 1).requires_grad_()
    return CriticOutputs(CriticOutput(reals, []), CriticOutput(fakes, []))


# -- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    # errors 0.5, -1, 0.05, 0; huber with delta 0.1: 0.45, 0.95, 0.0125
    [("l1", 1.55 / 4), ("l2", 1.2525 / 4), ("huber", 1.4125 / 4)],
)
def test_pixel_errors_by_hand(kind, expected):
    images = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    other = torch.tensor([0.5, -1.0, 0.05, 0.0], dtype=torch.float64).view(2, 1, 1, 2)
    assert pixel_error(other, images, kind, 0.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("cutoff", [None, 0.3])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_pixel_gradients_by_finite_differences(kind, cutoff):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 2, 4, dtype=torch.float64)
    y = torch.randn(2, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: pixel_error(r, x, kind, 0.1, cutoff), (y,))


def test_below_the_cutoff_a_pixel_error_by_hand():
    # Of 3 and 1 the mean, 2, lies at 0 cycles per pixel and the rest, 1 and -1, at 0.25.
    images = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    other = torch.tensor([3.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    for cutoff, expected in ((0.2, 2.0**2), (0.25, 2.0**2), (0.3, (3.0**2 + 1) / 2)):
        assert pixel_error(other, images, "l2", cutoff=cutoff).item() == pytest.approx(expected)
    assert pixel_error(other, images, "l1", cutoff=0.2).item() == pytest.approx(2.0)


def test_the_pixel_term_hears_everything_until_another_term_is_at_work():
    torch.manual_seed(0)
    images, leaf = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    errors = {c: pixel_error(leaf, images, "l2", cutoff=c).item() for c in (None, 0.2)}
    assert errors[0.2] < 0.5 * errors[None]
    later = LossConfig(
        pixel="l2", pixel_cutoff=0.2,
        learned=LearnedConfig(start_step=5), adversarial=AdversarialConfig(start_step=7),
    )  # fmt: skip
    off = replace(
        later, learned=LearnedConfig(weight=0.0), adversarial=AdversarialConfig(start_step=7)
    )
    for config, start in ((later, 5), (off, 7)):
        objective = Objective(config)
        for step, cutoff in ((start - 1, None), (start, 0.2)):
            value = objective.terms["pixel"].value(Inputs(step, images, leaf))
            assert value.item() == pytest.approx(errors[cutoff])


def test_the_learned_noise_level_moves_to_where_it_belongs():
    # error / exp(s) + s is least where exp(s) is the mean error.
    objective = Objective(LossConfig(pixel="l1", learned_logvar=True, kl_weight=0, **NO_CRITIC))
    parameter = objective.parameters["logvar"]
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    images, leaf = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    code = Gaussian()(torch.zeros(2, 2, 1, 1))
    for _ in range(400):
        optimizer.zero_grad()
        objective.latent_loss(Inputs(0, images, leaf), code)[0].backward()
        optimizer.step()
    assert parameter.item() == pytest.approx(math.log(0.25), abs=1e-2)
    leaf.requires_grad_()
    decoded = leaf * 1.0
    gradient = objective.gradient(Inputs(0, images, leaf), decoded, torch.zeros(())).decoder
    # d(error / exp(s)) = sign / n / 0.25
    torch.testing.assert_close(
        gradient, torch.full_like(gradient, 4 / gradient.numel()), rtol=0.02, atol=0
    )


# -- KL ---------------------------------------------------------------------------------------


def code_of(*channel_means: float) -> tuple[torch.Tensor, Code]:
    """Means with a gradient, and the code of posteriors of unit variance around them."""
    mean = torch.tensor(channel_means).view(1, -1, 1, 1).expand(2, -1, 2, 2).contiguous()
    mean.requires_grad_()
    return mean, Gaussian()(torch.cat([mean, torch.zeros_like(mean)], 1))


def test_channel_kl_by_hand():
    # unit variance: KL = mean^2 / 2
    facts = code_of(1.0, 3.0)[1].facts
    torch.testing.assert_close(facts["kl_channel"], torch.tensor([0.5, 4.5]))


def test_kl_by_finite_differences():
    mean = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(kl_divergence, (mean, logvar))
    by_hand = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    torch.testing.assert_close(kl_divergence(mean, logvar), by_hand)


def test_the_kl_is_annealed():
    objective = Objective(LossConfig(kl_weight=1.0, kl_ramp_steps=4, **NO_CRITIC))
    images = torch.zeros(2, 3, 8, 8)
    losses = [
        objective.latent_loss(Inputs(step, images, images), code_of(1.0, 3.0)[1])[0].item()
        for step in (0, 1, 3, 9)
    ]
    whole = (0.5 + 4.5) * 4 / images[0].numel()
    assert losses == pytest.approx([whole / 4, whole / 2, whole, whole])


def test_free_bits_leave_cheap_channels_alone_once_they_were_measured():
    objective = Objective(LossConfig(kl_weight=1.0, free_bits=1.0, **NO_CRITIC))
    images = torch.zeros(2, 3, 8, 8)

    def step() -> tuple[float, torch.Tensor]:
        mean, code = code_of(1.0, 3.0)  # 0.5 and 4.5 nats per value
        loss, log = objective.latent_loss(Inputs(0, images, images), code)
        (gradient,) = torch.autograd.grad(loss, mean)
        objective.finish_step(one)
        assert log["loss/kl"].item() == pytest.approx((0.5 + 4.5) * 4)  # what it is, not the loss
        return loss.item() * images[0].numel() / 4, gradient.abs().sum((0, 2, 3))

    loss, gradient = step()
    assert loss == pytest.approx(5.0)
    assert (gradient > 0).all()
    loss, gradient = step()
    assert loss == pytest.approx(1.0 + 4.5)
    assert gradient[0] == 0
    assert gradient[1] > 0


# -- other penalties --------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "expected"), [({}, 3 + 0.25 * 8), ({"commitment": 2.0}, 3 + 16)])
def test_penalties_weigh_what_their_bottleneck_says_or_the_recipe(own, expected):
    objective = Objective(LossConfig(penalties=own, **NO_CRITIC), penalties=Codebook.weights)
    images, latents = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 2, 2)
    paid = {"codebook": torch.tensor([2.0, 4.0]), "commitment": torch.tensor([6.0, 10.0])}
    loss, log = objective.latent_loss(Inputs(0, images, images), Code(latents, paid, {}))
    assert loss.item() == expected
    assert (log["loss/codebook"].item(), log["loss/commitment"].item()) == (3.0, 8.0)  # unweighted


# -- the learned distance ---------------------------------------------------------------------


def with_features(fakes: list, reals: list, averaged: tuple | None = None) -> Inputs:
    logits, image = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    found = CriticOutputs(CriticOutput(logits, reals), CriticOutput(logits, fakes), averaged)
    return Inputs(0, image, image, found)


def objective_with(**learned: object) -> Objective:
    return Objective(
        LossConfig(learned=LearnedConfig(**learned), adversarial=AdversarialConfig(weight=0.0))
    )


def test_layers_weights_and_normalization_by_hand():
    leaf = torch.zeros(1, 1, 1, 1, requires_grad=True)
    reals = [torch.full((1, 1, 2, 2), size) for size in (2.0, 10.0, 0.5)]
    fakes = [real + offset + leaf for real, offset in zip(reals, (1.0, 1.0, 1.0), strict=True)]
    inputs = with_features(fakes, reals)

    def value(objective: Objective) -> float:
        objective.terms["learned"].value(inputs)
        objective.finish_step(one)  # the magnitudes are those of the step before
        return objective.terms["learned"].value(inputs).item()

    assert value(objective_with()) == pytest.approx((1 / 2 + 1 / 10 + 1 / 0.5) / 3)
    assert value(objective_with(normalise=False)) == pytest.approx(1.0)
    assert value(objective_with(layers=(0, 2))) == pytest.approx((1 / 2 + 1 / 0.5) / 2)
    weighted = objective_with(layers=(0, 1), layer_weights=(3.0, 1.0))
    assert value(weighted) == pytest.approx((3 / 2 + 1 / 10) / 4)


def test_the_averages_features_measure_where_there_is_one():
    objective = objective_with(ema_decay=0.9, normalise=False)
    reals, fakes = [torch.zeros(1, 1, 1, 1)], [torch.ones(1, 1, 1, 1)]
    averaged = ([torch.zeros(1, 1, 1, 1)], [torch.full((1, 1, 1, 1), 5.0)])
    inputs = with_features(fakes, reals, averaged)
    assert objective.terms["learned"].value(inputs).item() == 5.0


# -- what counts as fake ----------------------------------------------------------------------


def adversarial_only(**adversarial: object) -> Objective:
    return Objective(
        LossConfig(
            pixel_weight=0.0,
            learned=LearnedConfig(weight=0.0),
            adversarial=AdversarialConfig(**adversarial),
        )
    )


def test_prior_samples_count_as_fakes_for_both_players():
    objective = adversarial_only(kind="hinge", prior_samples=True)
    outputs = outputs_of(
        0.0, 0.0, -2.0, 0.0, 3.0, 0.0
    )  # 2 reals, 2 reconstructions, 2 of the prior
    loss, _ = objective.critic.loss(outputs)
    assert loss.item() == pytest.approx(1.0 + (0 + 1 + 4 + 1) / 4)


def test_relativistic_pairs_repeat_the_reals():
    objective = adversarial_only(kind="relativistic", prior_samples=True)
    outputs = outputs_of(1.0, 2.0, 0.0, 0.0, 1.0, 1.0)
    loss, _ = objective.critic.loss(outputs)
    expected = sum(math.log1p(math.exp(-d)) for d in (1, 2, 0, 1)) / 4
    assert loss.item() == pytest.approx(expected)


# -- LeCam ------------------------------------------------------------------------------------


def test_lecams_anchors_are_those_of_earlier_steps_with_its_own_decay():
    objective = adversarial_only(kind="wasserstein", lecam=2.0, lecam_decay=0.75)
    outputs = outputs_of(1.0, 3.0, -2.0, 0.0)
    loss, _ = objective.critic.loss(outputs)
    assert loss.item() == pytest.approx(-3.0)  # nothing is known yet
    objective.finish_step(one)
    loss, log = objective.critic.loss(outputs)
    # anchors 2 and -1; reals to -1: 4, 16; fakes to 2: 16, 4
    assert log["penalty/lecam"].item() == pytest.approx(20.0)
    assert loss.item() == pytest.approx(-3.0 + 2 * 20.0)
    objective.means.observe("logit/real", torch.tensor(0.0))
    objective.means.finish_step(one)  # 1, 3 and 0 were seen in this step: a mean of 1
    assert objective.means.get("logit/real").item() == pytest.approx(0.75 * 2 + 0.25 * 1.0)


# -- schedules --------------------------------------------------------------------------------


def test_schedules_by_hand():
    assert [schedule(step, 3, 2) for step in range(6)] == [0, 0, 0, 0.5, 1, 1]
    assert [schedule(step, 3, 0) for step in range(5)] == [0, 0, 0, 1, 1]
