"""Other channels: at step 0 nothing changes on those that are shared."""

import copy

import pytest
import torch
from autoencoders import tiny_dc, tiny_kl
from public_shapes import public_autoencoder

from first_stage.errors import ConfigError
from first_stage.models.channels import add_latent_channels, inflate_images
from first_stage.models.first_stage import FirstStage


def images(channels):
    return torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def seen(model, pixels):
    """Moments and images in float64: random weights make 1e-5 of float32's rounding."""
    stage = FirstStage(copy.deepcopy(model).double())
    code = stage.family.to_code(stage.model, pixels.double())
    latents = code[:, : stage.latent_channels]
    return code, stage.family.to_images(stage.model, latents)


@pytest.mark.parametrize("name", ["sd", "flux2", "vq_f4"])
def test_gray_has_the_latents_of_its_rgb(name):
    gray = images(1)
    moments, decoded = seen(public_autoencoder(name), gray.repeat(1, 3, 1, 1))
    model = public_autoencoder(name)
    inflate_images(model, 1)
    found, found_decoded = seen(model, gray)
    torch.testing.assert_close(found, moments, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_decoded, decoded.mean(1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 7])
def test_shared_channels_are_as_they_were(channels):
    pixels = images(channels)
    moments, decoded = seen(public_autoencoder("sd"), pixels[:, :3])
    model = public_autoencoder("sd")
    inflate_images(model, channels)
    found, found_decoded = seen(model, pixels)
    assert FirstStage(model).in_channels == channels
    torch.testing.assert_close(found, moments, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_decoded[:, :3], decoded, rtol=0, atol=1e-6)
    extra = torch.ones((), dtype=torch.float64) if channels == 4 else decoded.mean(1, keepdim=True)
    torch.testing.assert_close(
        found_decoded[:, 3:], extra.expand(2, channels - 3, 32, 32), rtol=0, atol=1e-6
    )


def test_one_channel_becomes_three():
    gray = images(1)
    moments, decoded = seen(tiny_kl(in_channels=1), gray)
    model = tiny_kl(in_channels=1)
    inflate_images(model, 3)
    found, found_decoded = seen(model, gray.repeat(1, 3, 1, 1))
    torch.testing.assert_close(found, moments, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_decoded, decoded.repeat(1, 3, 1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_more_latent_channels_leave_the_others_and_the_images(name):
    pixels = images(3)
    moments, decoded = seen(public_autoencoder(name), pixels)
    model = public_autoencoder(name)
    channels = model.config.latent_channels
    add_latent_channels(model, 2)
    found, found_decoded = seen(model, pixels)
    mean, logvar = found.chunk(2, 1)
    old = torch.cat([mean[:, :channels], logvar[:, :channels]], 1)
    torch.testing.assert_close(old, moments, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_decoded, decoded, rtol=0, atol=1e-6)
    assert mean[:, channels:].std() > 1e-3  # they carry something
    stage = FirstStage(model)
    (stage(pixels).images.square().sum()).backward()
    assert model.decoder.conv_in.weight.grad[:, channels:].abs().sum() > 0


def test_what_cannot_be_inflated_is_refused():
    with pytest.raises(ConfigError, match="can become 1 or more than 3"):
        inflate_images(tiny_kl(), 2)
    with pytest.raises(ConfigError, match="is a AutoencoderDC: channels of"):
        inflate_images(tiny_dc(), 4)
    with pytest.raises(ConfigError, match="only AutoencoderKL takes more"):
        add_latent_channels(tiny_dc(), 1)
