import pytest
import torch
from autoencoders import build_autoencoder

from first_stage.models.bottlenecks import Gaussian
from first_stage.models.first_stage import (
    FirstStage,
)


def tiny_vae(**overrides):
    torch.manual_seed(0)
    options = {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_attention": False,
        "quant_conv": True,
        "sample_size": 16,
    }
    return build_autoencoder(**{**options, **overrides})


def test_one_forward_gives_reconstruction_and_posterior():
    vae = tiny_vae()
    stage = FirstStage(vae)
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    reconstruction, code, drawn, targets = stage(images, noise)
    assert targets is images
    distribution = vae.encode(images).latent_dist
    assert torch.equal(stage.encode(images).latents, distribution.mean)
    assert torch.equal(stage.encode(images).logvar, distribution.logvar)
    assert torch.equal(code.latents, drawn)
    latents = distribution.mean + distribution.std * noise
    torch.testing.assert_close(drawn, latents)
    torch.testing.assert_close(reconstruction, vae.decode(latents).sample)
    mode = stage(images).images
    torch.testing.assert_close(mode, vae.decode(distribution.mode()).sample)
    assert not torch.allclose(mode, reconstruction)  # noise is really used
    assert stage.downsample_factor == 2
    assert stage.latent_shape(16) == (4, 8, 8)


def test_autocast_outputs_are_float32():
    with torch.autocast("cpu", torch.bfloat16):
        stage, images = FirstStage(tiny_vae()), torch.randn(1, 3, 16, 16)
        reconstruction, code, *_ = stage(images)
        encoded = stage.encode(images)
    found = [reconstruction, code.latents, code.penalties["kl"], encoded.latents, encoded.logvar]
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_kl_is_nats_per_image():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    code = Gaussian()(torch.cat([mean, logvar], 1))
    torch.testing.assert_close(code.penalties["kl"], exact.sum((1, 2, 3)))
    torch.testing.assert_close(code.facts["kl_channel"], exact.mean((0, 2, 3)))
    assert Gaussian()(torch.zeros(1, 8, 2, 2)).penalties["kl"].item() == 0


def test_facts_of_a_gaussian_tell_signal_from_noise():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    facts = Gaussian()(torch.cat([mean, logvar], 1)).facts
    signal = facts["signal_square"] - facts["signal_mean"] ** 2
    torch.testing.assert_close(signal, mean.var((0, 2, 3), correction=0))
    torch.testing.assert_close(facts["noise_square"], logvar.exp().mean((0, 2, 3)))


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_channel_counts(in_channels):
    stage = FirstStage(tiny_vae(in_channels=in_channels))
    assert stage(torch.zeros(1, in_channels, 16, 16))[0].shape == (1, in_channels, 16, 16)
