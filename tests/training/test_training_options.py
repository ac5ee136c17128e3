"""Every option of the objective inside the trainer's step: against references, splits, resuming."""

import copy

import pytest
import torch
from stepping import assert_close, averaged, batch_of, gradients_of, make_trainer

from first_stage.data import Batch, images_from_pixels
from first_stage.losses.adversarial import PAIRS
from first_stage.losses.penalties import gradient_penalty, zero_centered_penalty
from first_stage.losses.terms import Inputs
from first_stage.metrics.training import derived
from first_stage.training.loop import train

OPTIONS = {
    "wasserstein with gradient penalty": {
        "loss__adversarial__kind": "wasserstein",
        "loss__adversarial__gradient_penalty": 10,
    },
    "wasserstein with clipped weights": {
        "loss__adversarial__kind": "wasserstein",
        "loss__adversarial__clip_weights": 0.01,
    },
    "logistic with R1": {"loss__adversarial__kind": "logistic", "loss__adversarial__r1": 5},
    "least squares with LeCam": {
        "loss__adversarial__kind": "least_squares",
        "loss__adversarial__lecam": 0.3,
    },
    "relativistic with R1 and R2": {
        "loss__adversarial__kind": "relativistic",
        "loss__adversarial__r1": 1,
        "loss__adversarial__r2": 1,
    },
    "prior samples": {"loss__adversarial__prior_samples": True},
    "encoder cut off": {"loss__adversarial__reaches_encoder": False},
    "both of them": {
        "loss__adversarial__prior_samples": True,
        "loss__adversarial__reaches_encoder": False,
        "loss__adversarial__kind": "relativistic",
    },
    "encoder cut off, then at rest": {
        "loss__adversarial__reaches_encoder": False,
        "train__encoder_steps": 2,
    },
    "decoder only": {"train__encoder_steps": 0, "model__quant_conv": False},
    "spectral norm": {"critic__norm": "spectral"},
    "antialiased, two scales": {"critic__antialias": True, "critic__scales": 2},
    "average of the critic": {"loss__learned__ema_decay": 0.8},
    "shares": {
        "loss__balance__kind": "shares",
        "loss__balance__shares": "{pixel: 0.5, learned: 0.3, adversarial: 0.2}",
    },
    "noise level, Huber": {"loss__learned_logvar": True, "loss__pixel": "huber"},
    "free bits": {"loss__kl_weight": 1, "loss__free_bits": 0.01, "loss__kl_ramp_steps": 3},
}


def parts(batch: Batch, count: int) -> list[Batch]:
    """A batch as micro-batches."""
    return [
        Batch(p, batch.positions[k * len(p) : (k + 1) * len(p)], [""] * len(p))
        for k, p in enumerate(batch.pixels.chunk(count))
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_split_batch_trains_what_a_whole_one_trains(tiny, options):
    config = tiny(train__clip_norm=None, **options)
    whole, split = make_trainer(config), make_trainer(config)
    for step in range(3):
        batch = batch_of(whole, 4, seed=step)
        expected = gradients_of(whole, step, [batch])
        assert all(g.isfinite().all() for part in expected.values() for g in part)
        assert_close(gradients_of(split, step, parts(batch, 2)), expected, rtol=2e-4)
        # The two are set alike again, so that rounding is not amplified by Adam.
        split.restore(copy.deepcopy(whole.snapshot(step)), averaged(whole))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_restored_trainer_goes_on_bit_for_bit(tiny, options):
    config = tiny(**options)
    straight, resumed = make_trainer(config), make_trainer(config)
    batches = [batch_of(straight, 4, seed=step) for step in range(4)]
    for step in range(2):
        straight.training_step(step, [batches[step]])
    resumed.restore(copy.deepcopy(straight.snapshot(2)), averaged(straight))
    for step in range(2, 4):
        straight.training_step(step, [batches[step]])
        resumed.training_step(step, [batches[step]])
    left, right = straight.snapshot(4).tensors, resumed.snapshot(4).tensors
    assert left.keys() == right.keys()
    for file in left:
        for name, tensor in left[file].items():
            if not name.startswith("meter."):
                assert torch.equal(tensor, right[file][name]), (file, name)


def forwards(trainer, batch: Batch):
    stage, critic = trainer.first_stage.network, trainer.critic.network
    images = images_from_pixels(batch.pixels)
    return images, stage(images, trainer.noise(batch)).images, critic


@pytest.mark.parametrize("kind", PAIRS)
def test_both_players_play_the_same_game(tiny, kind):
    """The pair's own functions, differentiated by the book through two whole networks."""
    trainer = make_trainer(
        tiny(
            loss__adversarial__kind=kind,
            loss__adversarial__r1=0.5,
            loss__balance__kind="fixed",
            loss__learned__weight=0,
            loss__kl_weight=0,
            train__clip_norm=None,
        )
    )
    batch = batch_of(trainer, 4, seed=0)
    images, reconstruction, critic = forwards(trainer, batch)
    reals, fakes = critic(images).logits, critic(reconstruction).logits
    pair = PAIRS[kind]
    weight = trainer.config.loss.adversarial.weight
    total = (reconstruction - images).abs().mean() + weight * pair.generator(reals.detach(), fakes)
    loss = pair.critic(critic(images).logits, critic(reconstruction.detach()).logits)
    loss = loss + 0.5 * zero_centered_penalty(lambda x: critic(x).logits, images)
    expected = {
        "first_stage": list(
            torch.autograd.grad(
                total, list(trainer.first_stage.network.parameters()), allow_unused=True
            )
        ),
        "critic": list(torch.autograd.grad(loss, list(critic.parameters()))),
    }
    expected["first_stage"] = [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(expected["first_stage"], trainer.first_stage.parameters, strict=True)
    ]
    assert_close(gradients_of(trainer, 0, [batch]), expected)


def test_the_gradient_penalty_is_on_interpolates_and_a_function_of_the_step(tiny):
    options = OPTIONS["wasserstein with gradient penalty"]
    trainer = make_trainer(tiny(train__clip_norm=None, **options))
    batch = batch_of(trainer, 4, seed=0)
    images, reconstruction, critic = forwards(trainer, batch)
    mix = trainer._mix(batch)
    assert not torch.equal(mix, trainer._mix(batch_of(trainer, 4, seed=1)))
    assert torch.equal(mix, trainer._mix(batch))
    assert 0 < mix.min() < mix.max() < 1
    penalty = gradient_penalty(lambda x: critic(x).logits, images, reconstruction, mix)
    logits = critic(reconstruction.detach()).logits, critic(images).logits
    loss = logits[0].mean() - logits[1].mean() + 10 * penalty
    expected = list(torch.autograd.grad(loss, list(critic.parameters())))
    found = gradients_of(trainer, 0, [batch])["critic"]
    assert_close({"critic": found}, {"critic": expected})
    on_reals = gradient_penalty(lambda x: critic(x).logits, images, images, mix)
    assert abs(on_reals.item() - penalty.item()) > 1e-6


def test_lazy_penalties_run_every_nth_step_and_count_n_times(tiny):
    options = {"loss__adversarial__r1": 1, "loss__adversarial__penalty_every": 2}
    trainer = make_trainer(tiny(**options))
    objective = trainer.objective.critic
    assert [objective.penalizes(step) for step in range(4)] == [True, False, True, False]
    images = torch.randn(2, 3, 16, 16)
    total, log = objective.penalty(trainer.critic.network.logits, images, images, torch.ones(2))
    assert total.item() == pytest.approx(2 * log["penalty/r1"].item())


def by_name(trainer, gradients: list) -> dict:
    named = [name for name, _ in trainer.first_stage.network.named_parameters()]
    return dict(zip(named, gradients, strict=True))


def test_the_adversarial_gradient_stops_before_the_encoder_where_asked(tiny):
    alone = {"loss__pixel_weight": 0, "loss__kl_weight": 0, "loss__learned__weight": 0}
    alone |= {"loss__balance__kind": "fixed", "loss__adversarial__weight": 1}
    found = {}
    for reaches in (True, False):
        config = tiny(train__clip_norm=None, loss__adversarial__reaches_encoder=reaches, **alone)
        trainer = make_trainer(config)
        gradients = gradients_of(trainer, 0, [batch_of(trainer, 4, 0)])["first_stage"]
        found[reaches] = by_name(trainer, gradients)
    for name in found[True]:
        inside = name.startswith(("model.encoder", "model.quant_conv"))
        if inside:
            assert not found[False][name].any(), name
        else:  # the decoder's is the same
            torch.testing.assert_close(found[False][name], found[True][name], rtol=1e-4, atol=1e-7)
    assert found[True]["model.encoder.conv_in.weight"].abs().max() > 0
    assert found[True]["model.decoder.conv_out.weight"].abs().max() > 0


def test_the_other_terms_reach_the_encoder_beside_a_cut_off(tiny):
    config = tiny(loss__adversarial__reaches_encoder=False, train__clip_norm=None)
    without = tiny(loss__adversarial__weight=0, train__clip_norm=None)
    trainers = make_trainer(config), make_trainer(without)
    trainers[0].training_step(0, [batch_of(trainers[0], 4, 0)])
    start, average = copy.deepcopy(trainers[0].snapshot(1)), averaged(trainers[0])
    found = []
    for trainer in trainers:
        trainer.restore(copy.deepcopy(start), average)
        gradients = gradients_of(trainer, 1, [batch_of(trainer, 4, 1)])["first_stage"]
        found.append(by_name(trainer, gradients)["model.encoder.conv_in.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_learned_distance_gives_the_critic_nothing_and_both_halves_something(tiny, average):
    config = tiny(
        loss__pixel_weight=0,
        loss__kl_weight=0,
        loss__adversarial__weight=0,
        loss__learned__ema_decay=average,
    )
    trainer = make_trainer(config)
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    batch = batch_of(trainer, 4, 1)
    images, reconstruction, _ = forwards(trainer, batch)
    decoded = reconstruction.detach().requires_grad_()
    inputs = Inputs(1, images, decoded, trainer._look(trainer.critic, images, decoded))
    last = trainer.first_stage.network.last_layer
    gradient = trainer.objective.gradient(inputs, reconstruction, last)
    (reconstruction * gradient.decoder).sum().backward()
    assert all(p.grad is None for p in trainer.critic.network.parameters())
    if trainer.critic_ema is not None:
        assert all(not p.requires_grad for p in trainer.critic_ema.parameters())
    named = dict(trainer.first_stage.network.named_parameters())
    assert named["model.encoder.conv_in.weight"].grad.abs().max() > 0
    assert named["model.decoder.conv_in.weight"].grad.abs().max() > 0


def test_the_average_measures_and_moves_slowly(tiny):
    trainer = make_trainer(tiny(loss__learned__ema_decay=0.9))
    before = copy.deepcopy(trainer.critic_ema.state_dict())
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    critic = trainer.critic.network.state_dict()
    for name, now in trainer.critic_ema.state_dict().items():
        # Its decay warms up: 1 / 10 in the first step.
        torch.testing.assert_close(now, 0.1 * before[name] + 0.9 * critic[name])
    assert any(not torch.equal(critic[name], before[name]) for name in before)
    for step in range(1, 4):
        trainer.training_step(step, [batch_of(trainer, 4, step)])
    distances = {
        name: (now - trainer.critic.network.state_dict()[name]).norm().item()
        for name, now in trainer.critic_ema.state_dict().items()
    }
    assert max(distances.values()) > 0


def test_the_noise_level_is_held_by_the_optimizer_and_moves(tiny):
    trainer = make_trainer(tiny(loss__learned_logvar=True))
    parameter = trainer.objective.parameters["logvar"]
    assert any(parameter is p for p in trainer.first_stage.parameters)
    for step in range(3):
        trainer.training_step(step, [batch_of(trainer, 4, step)])
    assert parameter.item() != 0.0
    assert "objective.parameter.logvar" in trainer.snapshot(3).tensors["means"]


def test_clipped_weights_stay_within_their_bounds(tiny):
    trainer = make_trainer(tiny(**OPTIONS["wasserstein with clipped weights"]))
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    assert max(p.abs().max().item() for p in trainer.critic.parameters) <= 0.01


def test_shares_do_not_explode_before_the_yardstick_is_known(tiny):
    trainer = make_trainer(tiny(train__clip_norm=None, **OPTIONS["shares"]))
    for step in range(3):
        trainer.training_step(step, [batch_of(trainer, 4, seed=step)])
        values = derived(trainer.meter.averages(lambda t: t))
        assert values.get("norm/learned", 0.0) < 2 * values["norm/pixel"], step
    assert values["norm/learned"] > 0


def test_shares_of_the_gradient_are_what_was_asked_for(tiny):
    trainer = make_trainer(
        tiny(train__max_steps=12, train__learning_rate=1e-5, **OPTIONS["shares"])
    )
    for step in range(12):
        trainer.training_step(step, [batch_of(trainer, 4, seed=0)])
        if step == 8:
            trainer.meter.averages(lambda t: t)  # the last steps are looked at
    values = derived(trainer.meter.averages(lambda t: t))
    wanted = {"pixel": 0.5, "learned": 0.3, "adversarial": 0.2}
    assert {k: values[f"share/{k}"] for k in wanted} == pytest.approx(wanted, abs=0.02)


def test_the_log_does_not_depend_on_how_a_batch_is_split(tiny):
    trainers = [make_trainer(tiny(loss__balance__kind="fixed")) for _ in range(2)]
    batch = batch_of(trainers[0], 4, seed=0)
    trainers[0].training_step(0, [batch])
    trainers[1].training_step(0, parts(batch, 4))
    whole, split = (derived(trainer.meter.averages(lambda t: t)) for trainer in trainers)
    for group in ("norm", "share", "cosine", "kl", "critic", "loss"):
        assert any(name.startswith(f"{group}/") for name in whole), group
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_nothing_is_decoded_beside_the_batch_before_the_critic_starts(tiny):
    options = OPTIONS["both of them"]
    starts = {"critic__start_step": 2, "loss__learned__start_step": 2}
    trainer = make_trainer(tiny(loss__adversarial__start_step=2, **starts, **options))
    batch = batch_of(trainer, 4, 0)
    assert trainer._prior_samples(1, batch) is None
    assert trainer._prior_samples(2, batch).shape == trainer.noise(batch).shape
    assert not trainer.objective.cuts_off(1)
    assert trainer.objective.cuts_off(2)


def test_a_run_says_in_words_that_its_kl_collapsed(tiny, capfd):
    config = tiny(
        loss__kl_weight=1e4,
        train__learning_rate=0.05,
        train__max_steps=30,
        loss__learned__weight=0,
        loss__adversarial__weight=0,
    )
    train(config)
    said = capfd.readouterr().err
    assert said.count("the KL has collapsed") == 1
