"""Holding latents to the original encoder's: the divergence, what it needs, what it carries."""

import copy
import shutil

import pytest
import torch
from autoencoders import tiny_dc, tiny_kl, tiny_taesd, tiny_vq
from conftest import arguments, picture
from equality import RECORDING, check_equal, line
from launching import run
from recording import record
from safetensors.torch import load_file
from stepping import batch_of, make_trainer
from torch.distributions import Normal, kl_divergence

from first_stage.config import parse_config
from first_stage.errors import ConfigError
from first_stage.losses.original import divergence
from first_stage.models.bottlenecks import Encoded, Gaussian, Plain
from first_stage.models.channels import add_latent_channels, inflate_images
from first_stage.models.first_stage import FirstStage
from first_stage.models.original import OriginalEncoder
from first_stage.training.loop import train

OFF = {"loss__learned__weight": 0, "loss__adversarial__weight": 0}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_and_gradient_are_those_of_torchs_distributions():
    output, other = (
        values(3, 6, 2, 4).requires_grad_(),
        Encoded(*values(3, 6, 2, 4, seed=1).chunk(2, 1)),
    )
    found = divergence(Gaussian()(output, values(3, 3, 2, 4, seed=2)), other, 3)
    mean, logvar = output.chunk(2, 1)
    expected = kl_divergence(
        Normal(mean, (0.5 * logvar).exp()), Normal(other.latents, (0.5 * other.logvar).exp())
    )
    expected = expected.sum((1, 2, 3)).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, output)[0] for v in (found, expected)))


def test_without_posteriors_it_is_half_the_squared_distance():
    output, other = values(3, 2, 2, 2).requires_grad_(), values(3, 2, 2, 2, seed=1)
    found = divergence(Plain()(output), Encoded(other), 2)
    unit = kl_divergence(Normal(output, 1.0), Normal(other, 1.0)).sum((1, 2, 3)).mean()
    torch.testing.assert_close(found, unit)
    torch.testing.assert_close(torch.autograd.grad(found, output)[0], (output - other) / 3)


@pytest.mark.parametrize("make", [tiny_kl, tiny_dc, tiny_taesd])
def test_the_copy_encodes_as_the_first_stage_did(make):
    stage = FirstStage(make())
    original = OriginalEncoder(stage)
    images = values(2, 3, 16, 16).float().clamp(-1, 1)
    expected = stage.encode(images)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.add_(0.1)
    found = original(images)
    assert torch.equal(found.moments, expected.moments)
    assert not any(p.requires_grad for p in original.parameters())
    held = sum(p.numel() for p in original.parameters())
    assert held == sum(p.numel() for part in stage.family.encoder_parts(stage.model)
                       for p in part.parameters())  # fmt: skip


def test_channels_that_were_added_are_not_held():
    model = tiny_kl()
    before = FirstStage(copy.deepcopy(model))
    inflate_images(model, 4)
    add_latent_channels(model, 2)
    stage = FirstStage(model)
    original = OriginalEncoder(stage, more=2)
    images = values(2, 4, 16, 16).float().clamp(-1, 1)
    torch.testing.assert_close(
        original(images).latents[:, :4], before.encode(images[:, :3]).latents, rtol=0, atol=1e-5
    )
    code = stage(images).code
    assert divergence(code, original(images), original.held).item() == 0
    new = code._replace(mean=code.mean + torch.tensor([0.0] * 4 + [1.0] * 2).view(6, 1, 1))
    assert divergence(new, original(images), original.held).item() == 0
    old = code._replace(mean=code.mean + torch.tensor([1.0] + [0.0] * 5).view(6, 1, 1))
    assert divergence(old, original(images), original.held) > 1
    resumed = OriginalEncoder(stage)
    resumed.load_state_dict(original.state_dict())
    assert resumed.held == original.held == 4


@pytest.mark.parametrize("channels", [3, 4])
def test_the_term_pulls_the_encoder_back_and_weighs_like_the_kl(tiny, tmp_path, channels):
    tiny_kl().save_pretrained(tmp_path / "before")
    trainer = make_trainer(
        tiny(model__pretrained=tmp_path / "before", model__in_channels=channels,
             model__inflate_channels=True, loss__original__weight=0.5, loss__kl_weight=0, **OFF)
    )  # fmt: skip
    network, objective = trainer.first_stage.network, trainer.objective
    images = values(4, channels, 16, 16).float().clamp(-1, 1)
    inputs = type("Given", (), {"step": 0, "encoded": images})
    loss, log = objective.latent_loss(inputs, network(images).code)
    assert loss.item() == log["loss/original"].item() == 0  # it is still the original
    with torch.no_grad():
        network.model.quant_conv.weight.mul_(1.3)
    loss, log = objective.latent_loss(inputs, network(images).code)
    kl = divergence(network(images).code, trainer.original(images), 4)
    assert loss.item() == pytest.approx(0.5 * kl.item() / (channels * 256), rel=1e-5)
    loss.backward()
    assert network.model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert network.model.decoder.conv_in.weight.grad is None


def test_a_heavy_weight_keeps_latents_where_they_were(tiny, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "before")
    images = values(4, 3, 16, 16).float().clamp(-1, 1)
    expected = FirstStage(tiny_kl()).encode(images).latents
    drift = {}
    for weight in (0, 1000):
        trainer = make_trainer(
            tiny(
                model__pretrained=tmp_path / "before",
                loss__original__weight=weight,
                train__max_steps=8,
                **OFF,
            )
        )
        for step in range(8):
            trainer.training_step(step, [batch_of(trainer, 4, step)])
        with torch.no_grad():
            moved = trainer.first_stage.network.encode(images).latents - expected
        drift[weight] = moved.square().mean().item()
    assert drift[1000] < 0.5 * drift[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give model.pretrained"),
        ({"model__pretrained": "x", "train__parts": "[decoder]"}, "nothing of the encoder"),
        ({"model__pretrained": "x", "train__encoder_steps": 0}, "train.encoder_steps is 0"),
    ],
)
def test_what_it_needs_is_said(fields, words, tiny):
    with pytest.raises(ConfigError, match=words):
        tiny(loss__original__weight=1.0, **fields)


def test_codes_are_refused(tiny, tmp_path):
    tiny_vq().save_pretrained(tmp_path / "vq")
    with pytest.raises(ConfigError, match="latents are codes of a codebook"):
        make_trainer(tiny(model__pretrained=tmp_path / "vq", loss__original__weight=1.0))


FIELDS = {"loss.original.weight": 0.5, "loss.kl_weight": 0}


def test_a_run_held_to_its_original_goes_on_without_it(tmp_path, images, monkeypatch):
    """N and N steps are 2N bit for bit, though the pretrained first stage was deleted between."""
    fields = {**FIELDS, "train.max_steps": 4, "train.ema_decay": 0.9, "train.checkpoint_every": 2,
              "model.more_latent_channels": 1, "model.pretrained": tmp_path / "before"}  # fmt: skip
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        tiny_kl().save_pretrained(tmp_path / "before")
        steps = {"train.max_steps": 4 if name == "whole" else 2}
        train(parse_config(arguments("run", images, **{**fields, **steps})))
    shutil.rmtree(tmp_path / "before")
    on = ["--config", "run/config.yaml", "--resume", "latest", "--train.max_steps", "4"]
    train(parse_config(on))
    for name in ("first_stage", "optimizers", "original", "means"):
        file = f"run/checkpoints/step-000004/{name}.safetensors"
        one, two = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert set(one) == set(two)
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert {p.name for p in (tmp_path / "parts/run/export").glob("*.safetensors")} == {
        "diffusion_pytorch_model.safetensors"
    }


def test_two_processes_are_held_as_one_is(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(17):
        picture(index).save(tmp_path / "images" / f"{index:02d}.png")
    tiny_kl().save_pretrained(tmp_path / "before")
    fields = {**FIELDS, "model.pretrained": tmp_path / "before", "loss.original.weight": 0.01}
    record(parse_config(line(tmp_path, "one", 2, **fields)), tmp_path / "record-one")
    run(
        *(2, RECORDING, tmp_path / "record-many", tmp_path / "one"),
        *line(tmp_path, "many", 3, **fields),
        output=tmp_path / "many.txt",
    )
    check_equal(tmp_path, "many", 2)
