"""The step with disturbed latents: isolated references, and who sees what."""

import pytest
import torch
from by_the_book import critic_gradient, kl_to_prior
from conftest import arguments
from stepping import assert_close, batch_of, gradients_of, make_trainer
from test_resume import contents, train_until

from first_stage.config import parse_config
from first_stage.data import Batch, images_from_pixels
from first_stage.errors import ConfigError
from first_stage.training.loop import train

EVERYTHING = {
    "disturb.equivariance.probability": 1,
    "disturb.equivariance.transforms": "[scale,flip,turn]",
    "disturb.equivariance.least_scale": 0.75,
    "disturb.noise.probability": 0.5,
    "disturb.prefix.probability": 0.5,
    "disturb.prefix.channels": 2,
    "loss.variance.weight": 0.01,
    "loss.spectrum.weight": 0.1,
}


def everything(tiny, **more):
    return tiny(**{n.replace(".", "__"): v for n, v in (EVERYTHING | more).items()})


def reference(trainer, step: int, batch: Batch) -> dict[str, list]:
    """Both gradients from the draws, written down anew: interpolation, noise, mask, losses."""
    config, stage, critic = trainer.config.loss, trainer.first_stage.network, trainer.critic.network
    images = images_from_pixels(batch.pixels)
    draw = trainer._disturbance(step, batch)
    output = stage.family.to_code(stage.model, images)
    mean, logvar = output.chunk(2, 1)
    z = mean + (0.5 * logvar).exp() * trainer.noise(batch)
    kind, amount = draw.geometry
    if kind == "scale":
        small = (amount, amount), (2 * amount, 2 * amount)
        z, target = (
            torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
            for x, size in zip((z, images), small, strict=True)
        )
    else:
        z, target = (
            x.flip(-1) if kind == "flip" else x.rot90(amount, (-2, -1)) for x in (z, images)
        )
    side = z.shape[-1]
    rows = []
    for n, latents in enumerate(z):
        strength, share = draw.amounts[:, n]
        noise = strength * latents.std(unbiased=False) * draw.noise[n, :, :side, :side]
        latents = (1 - share) * latents + share * noise
        rows.append(torch.cat([latents[: draw.kept[n]], 0 * latents[draw.kept[n] :]]))
    decoded = stage.model.decode(torch.stack(rows)).sample
    fakes = critic(decoded)
    total = (decoded - target).abs().mean() - config.adversarial.weight * fakes.logits.mean()
    total = total + config.kl_weight * kl_to_prior(mean, logvar, images)
    first = torch.autograd.grad(total, list(stage.parameters()))
    return {"first_stage": list(first), "critic": critic_gradient(critic, target, decoded)}


def test_each_players_gradient_is_the_isolated_one(tiny):
    config = everything(
        tiny, **{"loss.balance.kind": "fixed", "loss.learned.weight": 0, "loss.kl_weight": 1e-2,
                 "loss.variance.weight": 0, "loss.spectrum.weight": 0, "train.clip_norm": None,
                 "train.max_steps": 8},
    )  # fmt: skip
    trainer, kinds = make_trainer(config), set()
    for step in range(8):
        batch = batch_of(trainer, 4, seed=step)
        kinds.add(trainer._disturbance(step, batch).geometry.kind)
        expected = reference(trainer, step, batch)
        assert_close(gradients_of(trainer, step, [batch]), expected)
    assert kinds == {"scale", "flip", "turn"}


def test_accumulation_equals_the_large_batch(tiny):
    trainers = [make_trainer(everything(tiny)) for _ in range(2)]
    for step in range(3):
        whole = batch_of(trainers[0], 4, step)
        parts = [
            Batch(whole.pixels[i : i + 2], whole.positions[i : i + 2], whole.ids[i : i + 2])
            for i in (0, 2)
        ]
        expected = gradients_of(trainers[0], step, [whole])
        assert_close(gradients_of(trainers[1], step, parts), expected, rtol=2e-3)


def test_the_critic_and_the_terms_see_images_that_moved_with_the_latents(tiny):
    config = everything(tiny, **{"disturb.equivariance.transforms": "[scale]"})
    trainer, seen = make_trainer(config), []
    trainer.critic.network.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape))
    batch = batch_of(trainer, 4, 0)
    trainer.training_step(0, [batch])
    side = 2 * trainer._disturbance(0, batch).geometry.amount
    assert side < 16
    assert seen == [(4, 3, side, side)] * 2  # reals, fakes


def test_prior_samples_have_the_size_of_the_rest(tiny):
    config = everything(tiny, **{"disturb.equivariance.transforms": "[scale]",
                                 "loss.adversarial.prior_samples": "true",
                                 "loss.adversarial.reaches_encoder": "false"})  # fmt: skip
    trainer = make_trainer(config)
    for step in range(2):
        trainer.training_step(step, [batch_of(trainer, 4, step)])


def test_nothing_is_disturbed_while_the_encoder_rests(tiny):
    config = everything(tiny, **{"train.encoder_steps": 1, "train.clip_norm": None})
    trainer = make_trainer(config)
    plain = make_trainer(tiny(train__encoder_steps=1, train__clip_norm=None))
    trainer.training_step(0, [batch_of(trainer, 4, 0)])
    plain.restore(trainer.snapshot(1), trainer.first_stage.network.model)
    batch = batch_of(trainer, 4, 1)
    found, expected = (gradients_of(t, 1, [batch])["first_stage"] for t in (trainer, plain))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_validation_export_and_encoding_know_nothing_of_it(tiny):
    """They call `encode` and `decode`, which take no disturbance."""
    trainer = make_trainer(everything(tiny))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad(), trainer.ema_weights() as stage:
        encoded = stage.encode(images)
        expected = stage.model.encode(images).latent_dist.mode()
        assert torch.equal(encoded.latents, expected)
        assert torch.equal(stage.decode(encoded.latents), stage.model.decode(expected).sample)


def test_n_and_n_steps_are_2n_bit_for_bit(tmp_path, images, monkeypatch):
    fields = {**EVERYTHING, "train.max_steps": 6, "train.micro_batch_size": 2, "train.log_every": 2,
              "validation.every": 3}  # fmt: skip
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    assert train(parse_config(arguments("run", images, **fields))).finished
    monkeypatch.chdir(tmp_path / "stopped")
    train_until(parse_config(arguments("run", images, **fields)), 3)
    assert train(parse_config(["--config", "run/config.yaml", "--resume", "latest"])).finished
    expected = contents(tmp_path / "undisturbed" / "run")
    found = contents(tmp_path / "stopped" / "run")
    assert {n: h for n, h in found.items() if "step-000003/" not in n} == expected
    assert "latent_share/spectrum" in (tmp_path / "stopped/run/log.jsonl").read_text()


@pytest.mark.parametrize(("fields", "words"), [
    ({"disturb.noise.probability": 0.5, "train.encoder_steps": 0}, "train.encoder_steps is 0"),
    ({"loss.spectrum.weight": 1, "train.encoder_steps": 0}, "loss.spectrum has only the encoder"),
    ({"disturb.equivariance.probability": 0.5, "disturb.equivariance.transforms": "[]"},
     "transforms is empty"),
    ({"disturb.equivariance.probability": 0.5, "disturb.equivariance.least_scale": 0.2},
     "the critic needs 6"),
    ({"disturb.equivariance.probability": 1.5}, "from 0 to 1"),
    ({"disturb.equivariance.transforms": "[shear]"}, "shear"),
])  # fmt: skip
def test_what_cannot_work_is_said_in_one_line(tmp_path, images, fields, words):
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments(tmp_path / "run", images, **fields))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_codebook_turns_and_flips(tmp_path, images):
    fields = {"model.family": "vq", "model.vq.codes": 8, "train.max_steps": 3,
              "disturb.equivariance.probability": 1,
              "disturb.equivariance.least_scale": 0.5}  # fmt: skip
    with pytest.raises(ConfigError, match="between the codes"):
        train(parse_config(arguments(tmp_path / "scaled", images, **fields)))
    fields["disturb.equivariance.transforms"] = "[flip,turn]"
    assert train(parse_config(arguments(tmp_path / "turned", images, **fields))).finished
