"""The step against isolated references: what each player's gradient must be."""

import copy
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from by_the_book import critic_gradient, kl_to_prior
from stepping import assert_close, averaged, batch_of, gradients_of, make_trainer
from torch import nn
from torch.torch_version import TorchVersion

from first_stage.config.schema import TrainConfig
from first_stage.data import Batch, images_from_pixels
from first_stage.metrics.training import derived
from first_stage.training.players import learning_rate_share
from first_stage.training.step import Trainer


def reference(trainer: Trainer, batch: Batch) -> dict[str, list]:
    """Both gradients by the book: two full passes, each player's loss differentiated whole."""
    config = trainer.config.loss
    stage, critic = trainer.first_stage.network, trainer.critic.network
    images = images_from_pixels(batch.pixels)
    reconstruction = stage(images, trainer.noise(batch)).images
    pixel = (reconstruction - images).abs().mean()
    with torch.no_grad():
        reals = critic(images)
    fakes = critic(reconstruction)
    magnitudes = trainer.objective.means.get("magnitude")
    learned = torch.zeros(())
    if magnitudes is not None:
        learned = torch.stack(
            [
                (fake - real).abs().mean() / size
                for fake, real, size in zip(fakes.features, reals.features, magnitudes, strict=True)
            ]
        ).mean()
    generator = -fakes.logits.mean()
    others = config.pixel_weight * pixel + config.learned.weight * learned
    target = trainer.objective.means.get("reconstruction/others")
    factor = torch.zeros(())
    if config.balance.kind == "fixed":
        factor = torch.ones(())
    elif target is not None:
        factor = (target / trainer.objective.means.get("reconstruction/adversarial")).sqrt()
    total = others + config.adversarial.weight * factor * generator
    mean, logvar = stage.encode(images)
    total = total + config.kl_weight * kl_to_prior(mean, logvar, images)
    first_stage = torch.autograd.grad(total, list(stage.parameters()))
    return {
        "first_stage": list(first_stage),
        "critic": critic_gradient(critic, images, reconstruction),
    }


@pytest.mark.parametrize("balance", ["adaptive", "fixed"])
def test_each_players_gradient_is_the_isolated_one_over_several_steps(tiny, balance):
    trainer = make_trainer(
        tiny(loss__balance__kind=balance, loss__kl_weight=1e-2, train__clip_norm=None)
    )
    for step in range(4):
        batch = batch_of(trainer, 4, seed=step)
        expected = reference(trainer, batch)
        assert_close(gradients_of(trainer, step, [batch]), expected)
        for player in (trainer.first_stage, trainer.critic):
            assert all(p.grad is None for p in player.parameters)  # nothing piles up


def test_the_learned_distance_alone_moves_decoder_and_encoder(tiny):
    config = tiny(loss__pixel_weight=0, loss__kl_weight=0, loss__adversarial__weight=0)
    trainer = make_trainer(config)
    first = gradients_of(trainer, 0, [batch_of(trainer, 4, 0)])["first_stage"]
    assert all(not g.any() for g in first)  # the yardstick is not measured before the first step
    gradients = gradients_of(trainer, 1, [batch_of(trainer, 4, 1)])["first_stage"]
    names = [name for name, _ in trainer.first_stage.network.named_parameters()]
    for part in (
        "model.encoder.conv_in.weight",
        "model.decoder.conv_in.weight",
        "model.decoder.conv_out",
    ):
        found = [g for n, g in zip(names, gradients, strict=True) if n.startswith(part)]
        assert all(g.abs().max() > 0 for g in found), part


@pytest.mark.parametrize("at", ["reconstruction", "last_layer"])
def test_accumulation_equals_the_large_batch(tiny, at):
    trainers = [make_trainer(tiny(loss__balance__at=at)) for _ in range(2)]
    for step in range(3):
        whole = batch_of(trainers[0], 4, step)
        parts = [
            Batch(whole.pixels[i : i + 2], whole.positions[i : i + 2], whole.ids[i : i + 2])
            for i in (0, 2)
        ]
        expected = gradients_of(trainers[0], step, [whole])
        assert_close(gradients_of(trainers[1], step, parts), expected, rtol=2e-3)
    states = [t.objective.means.state_dict() for t in trainers]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-3, atol=1e-7)


def test_parameters_optimizers_and_ema_are_float32_and_move_under_bf16(tiny):
    trainer = make_trainer(tiny(train__precision="bf16", train__ema_decay=0.5))
    before = [p.detach().clone() for p in trainer.first_stage.network.model.parameters()]
    averaged = [p.clone() for p in trainer.ema.shadow_params]
    for step in range(2):
        trainer.training_step(step, [batch_of(trainer, 4, step)])
    states = [v for o in (trainer.first_stage, trainer.critic) for v in o.optimizer.state.values()]
    tensors = [*trainer.first_stage.network.model.parameters(), *trainer.ema.shadow_params]
    tensors += [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    assert all(t.dtype == torch.float32 for t in tensors)
    moved = [
        not torch.equal(p, b)
        for p, b in zip(trainer.first_stage.network.model.parameters(), before, strict=True)
    ]
    assert all(moved)
    pairs = zip(trainer.ema.shadow_params, averaged, strict=True)
    assert all(not torch.equal(p, b) for p, b in pairs)


def test_layout_mode_and_checkpointing_change_no_gradient(tiny):
    plain, fast = make_trainer(tiny()), make_trainer(tiny(model__gradient_checkpointing=True))
    for player in (plain.first_stage, plain.critic):
        player.network.to(memory_format=torch.contiguous_format).train()
    for step in range(2):
        batch = batch_of(plain, 4, step)
        expected = gradients_of(plain, step, [batch])
        assert_close(gradients_of(fast, step, [batch]), expected)
        fast.restore(copy.deepcopy(plain.snapshot(step)), plain.first_stage.network.model)


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.9"),
    reason="torch 2.8 ends in a segmentation fault in the backward pass of bf16 convolutions",
)
def test_bf16_gradients_are_as_near_as_the_plain_form_comes(tiny):
    exact = make_trainer(tiny())
    exact.training_step(0, [batch_of(exact, 4, 0)])  # now every term has its weight
    start = copy.deepcopy(exact.snapshot(1))
    AcceleratorState._reset_state(reset_partial_state=True)  # it allows one precision a process
    rounded = make_trainer(tiny(train__precision="bf16"))
    rounded.restore(start, exact.first_stage.network.model)
    batch = batch_of(exact, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = reference(rounded, batch)
    truth = reference(exact, batch)
    found = gradients_of(rounded, 1, [batch])
    for player in truth:
        goal, ours, theirs = (
            torch.cat([g.flatten().float() for g in x[player]]) for x in (truth, found, plain)
        )
        errors = [(x - goal).norm() / goal.norm() for x in (ours, theirs)]
        assert 0 < errors[0] < 0.2, player
        assert errors[0] < 1.5 * errors[1], player


def test_after_its_steps_the_encoder_stays_as_its_average(tiny):
    trainer = make_trainer(tiny(train__max_steps=5, train__encoder_steps=2, train__ema_decay=0.9))
    encoder, decoder = (
        trainer.first_stage.network.model.encoder,
        trainer.first_stage.network.model.decoder,
    )
    for step in range(2):
        trainer.training_step(step, [batch_of(trainer, 4, seed=step)])
    resting = averaged(trainer).state_dict()
    assert not all(
        torch.equal(resting[n], p) for n, p in trainer.first_stage.network.model.named_parameters()
    )
    for step in range(2, 5):
        batch = batch_of(trainer, 4, seed=step)
        found = gradients_of(trainer, step, [batch])["first_stage"]
        names = [name for name, _ in trainer.first_stage.network.model.named_parameters()]
        for name, gradient in zip(names, found, strict=True):
            learns = name.startswith(("decoder.", "post_quant_conv."))
            assert gradient.any() == learns, name
    for live in (trainer.first_stage.network.model, averaged(trainer)):
        state = live.state_dict()
        assert all(torch.equal(state[f"encoder.{n}"], p) for n, p in encoder.named_parameters())
        same = {name for name, value in state.items() if torch.equal(value, resting[name])}
        assert {n for n in state if n.startswith(("encoder.", "quant_conv."))} <= same
        assert not any(f"decoder.{name}" in same for name, p in decoder.named_parameters())


def test_the_decoder_alone_computes_in_the_same_precision(tiny):
    trainer = make_trainer(tiny(train__encoder_steps=1, train__precision="bf16"))
    seen = []
    trainer.first_stage.network.model.decoder.conv_in.register_forward_hook(
        lambda *a: seen.append(a[-1].dtype)
    )
    for step in range(3):
        trainer.training_step(step, [batch_of(trainer, 4, seed=step)])
    assert seen == [torch.bfloat16] * 3


def test_the_decoders_gradient_is_the_same_whether_the_encoder_learns_or_not(tiny):
    learning, resting = (
        make_trainer(tiny(train__encoder_steps=steps, train__clip_norm=None)) for steps in (None, 0)
    )
    batch = batch_of(learning, 4, seed=0)
    found = [gradients_of(t, 0, [batch])["first_stage"] for t in (learning, resting)]
    names = [name for name, _ in learning.first_stage.network.model.named_parameters()]
    for name, a, b in zip(names, *found, strict=True):
        assert torch.equal(b, a if name.startswith(("decoder", "post")) else torch.zeros_like(a))


def test_the_critic_is_not_run_before_its_start(tiny):
    trainer = make_trainer(
        tiny(critic__start_step=2, loss__learned__start_step=2, loss__adversarial__start_step=3)
    )
    calls = []
    trainer.critic.network.to_logits.register_forward_hook(lambda *_: calls.append(step))
    weights = trainer.critic.network.to_logits.weight
    for step in range(4):
        before = weights.detach().clone()
        trainer.training_step(step, [batch_of(trainer, 4, step)])
        assert torch.equal(weights, before) == (step < 2)
    assert calls == [2, 2, 3, 3]  # reals and fakes, once each for both players


def test_gradients_are_averaged_over_processes_in_the_last_micro_batch_alone(tiny):
    trainer = make_trainer(tiny())
    parts = [batch_of(trainer, 1, seed) for seed in range(3)]
    with mock.patch.object(trainer.accelerator, "no_sync", wraps=trainer.accelerator.no_sync) as no:
        trainer.training_step(0, parts)
    entered = [call.args[0] for call in no.call_args_list]
    assert entered == 2 * [trainer.first_stage.module, trainer.critic.module]


def test_the_noise_levels_gradient_is_averaged_over_processes_too(tiny):
    applied = []
    for shrunk in (1, 4):
        trainer = make_trainer(tiny(loss__learned_logvar=True, train__clip_norm=None))
        level = trainer.objective.parameters["logvar"]
        trainer.first_stage.optimizer.register_step_pre_hook(
            lambda *_, level=level: applied.append(level.grad.item())
        )
        # Stands in for processes whose gradients cancel each other in part.
        with mock.patch.object(trainer.processes, "average", lambda t, n=shrunk: t / n):
            trainer.training_step(0, [batch_of(trainer, 4, 0)])
    assert applied[1] == pytest.approx(applied[0] / 4)
    assert applied[0] != 0


def test_everything_that_counts_steps_counts_the_same(tiny):
    trainer = make_trainer(tiny(train__micro_batch_size=1))
    for step in range(3):
        parts = [batch_of(trainer, 1, 10 * step + i) for i in range(4)]
        trainer.training_step(step, parts)
    assert trainer.ema.optimization_step == 3
    for player in (trainer.first_stage, trainer.critic):
        assert {int(s["step"]) for s in player.optimizer.state.values()} == {3}


def test_a_step_never_waits_for_the_device(tiny):
    trainer = make_trainer(tiny())
    batch = batch_of(trainer, 4, 0)
    for step in range(2):
        trainer.training_step(step, [batch])

    def forbidden(*_):
        raise AssertionError("a tensor's value was read inside the step")

    reads = ("item", "tolist", "__bool__", "__float__", "__int__")
    with mock.patch.multiple(torch.Tensor, **dict.fromkeys(reads, forbidden)):
        # AdamW reads its own step counter, which lies on the CPU.
        for player in (trainer.first_stage, trainer.critic):
            player.optimizer.step = lambda: None
        trainer.training_step(2, [batch])


def test_no_network_mixes_the_samples_of_a_batch(tiny):
    trainer = make_trainer(tiny())
    for network in (trainer.first_stage.network, trainer.critic.network):
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    images = torch.randn(3, 3, 16, 16)
    together = trainer.critic.network(images).logits
    alone = torch.cat([trainer.critic.network(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone)


def test_without_adversary_and_learned_distance_there_is_no_critic(tiny):
    trainer = make_trainer(tiny(loss__adversarial__weight=0, loss__learned__weight=0))
    assert trainer.critic is None
    trainer.training_step(0, [batch_of(trainer, 4, 0)])


def test_shares_of_the_gradient_are_logged(tiny):
    trainer = make_trainer(tiny())
    for step in range(3):
        trainer.training_step(step, [batch_of(trainer, 4, step)])
    values = derived(trainer.meter.averages(lambda t: t))
    shares = [values[f"share/{name}"] for name in ("pixel", "learned", "adversarial")]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0


def test_the_adaptive_weight_gives_the_adversarial_gradient_its_share(tiny):
    trainer = make_trainer(
        tiny(loss__adversarial__weight=0.3, loss__learned__weight=0, loss__balance__smoothing=0)
    )
    batch = batch_of(trainer, 4, 0)

    def measure_only(*_):
        trainer.objective.finish_step(lambda t: t)

    with mock.patch.object(trainer, "_update", measure_only):
        for step in range(2):  # the same weights and images twice: the lag has nothing to miss
            trainer.meter.averages(lambda t: t)
            trainer.training_step(step, [batch])
    values = derived(trainer.meter.averages(lambda t: t))
    assert values["norm/adversarial"] / values["norm/pixel"] == pytest.approx(0.3, rel=0.02)


def test_the_average_moves_by_the_share_that_its_decay_leaves(tiny):
    trainer = make_trainer(tiny(train__ema_decay=0.2))
    trainer.ema.optimization_step = 100  # its warm-up, up to (1 + n) / (10 + n), is over
    for average in trainer.ema.shadow_params:
        average.fill_(1.0)
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    weights = trainer.first_stage.network.parameters()
    for average, weight in zip(trainer.ema.shadow_params, weights, strict=True):
        torch.testing.assert_close(average, 0.2 + 0.8 * weight.detach())


@pytest.mark.parametrize(("own", "expected"), [(5e-4, 5e-4), (None, 1e-3)])
def test_the_critic_has_a_learning_rate_of_its_own_where_one_is_given(tiny, own, expected):
    trainer = make_trainer(
        tiny(train__learning_rate=1e-3, critic__learning_rate=own, train__warmup_steps=0)
    )
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    players = (trainer.first_stage, trainer.critic)
    assert [p.optimizer.param_groups[0]["lr"] for p in players] == [1e-3, expected]


def test_the_learning_rate_is_a_function_of_the_step():
    config = TrainConfig(max_steps=100, warmup_steps=10, decay_steps=20, final_rate=0.1)
    shares = [learning_rate_share(step, config) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:80] == [1.0] * 71
    assert shares[89] == pytest.approx(0.55)
    assert shares[99] == pytest.approx(0.1)
    assert shares[79:] == sorted(shares[79:], reverse=True)
    assert learning_rate_share(5, TrainConfig()) == 1.0
