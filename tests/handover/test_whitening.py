"""Whitening: covariance 1, the same pictures, and what cannot be whitened."""

import json

import numpy as np
import pytest
import torch
from autoencoders import build_autoencoder
from conftest import picture, run_script
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from first_stage.data import open_source
from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.handover.whitening import (
    CovarianceSums,
    LatentCovariance,
    fold_whitening,
    measure_covariance,
    whitening_matrix,
)
from latent_tools import CacheOptions, precompute


def stage(quant_conv: bool = True) -> AutoencoderKL:
    """A tiny autoencoder whose channels repeat each other, with noise of several sizes."""
    torch.manual_seed(0)
    vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, quant_conv, 16).eval()
    with torch.no_grad():
        out = vae.quant_conv if quant_conv else vae.encoder.conv_out
        out.weight[1] = 0.9 * out.weight[0] + 0.1 * out.weight[1]
        out.weight[:4] *= torch.tensor([1.0, 5.0, 0.2, 1.0]).view(4, 1, 1, 1)
        out.bias[:4] += torch.tensor([3.0, -1.0, 0.0, 0.5])
        out.weight[4:] *= 0.1
        out.bias[4:] = torch.tensor([-2.0, -1.0, -4.0, -3.0])
    return vae


def images(count: int = 6) -> torch.Tensor:
    pixels = np.stack([np.asarray(picture(n, 16, 16)) for n in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_matrix_whitens_draws_and_keeps_their_noise_independent():
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.tensor([0.1, 2.0, 0.5, 0.01, 1.0]).double()
    found = LatentCovariance(torch.zeros(5).double(), root @ root.mT, noise)
    matrix, shares = whitening_matrix(found)
    torch.testing.assert_close(matrix @ found.total @ matrix.mT, torch.eye(5).double())
    torch.testing.assert_close(matrix @ torch.diag(noise) @ matrix.mT, torch.diag(shares))
    assert shares.tolist() == sorted(shares.tolist())  # the most signal first
    assert 0 < shares[0] < shares[-1] < 1


@pytest.mark.parametrize("quant_conv", [True, False])
@torch.no_grad()
def test_exported_latents_have_covariance_1_and_the_pictures_stay(quant_conv):
    vae, x = stage(quant_conv), images()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    found = measure_covariance(vae, [x[:2], x[2:]], Processes())
    correlation = np.corrcoef(found.signal.numpy())
    assert abs(correlation[0, 1]) > 0.9  # there is something to whiten
    folded = fold_whitening(vae, found)
    again = measure_covariance(folded, [x], Processes())
    torch.testing.assert_close(again.total, torch.eye(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(again.mean, torch.zeros(4).double(), atol=1e-4, rtol=0)
    pictures = vae.decode(vae.encode(x).latent_dist.mode()).sample
    whitened = folded.decode(folded.encode(x).latent_dist.mode()).sample
    torch.testing.assert_close(whitened, pictures, atol=1e-5, rtol=0)
    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.0, 0.0)
    assert set(before) == set(vae.state_dict())  # what was folded is a copy
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())


@torch.no_grad()
def test_draws_have_covariance_1_too():
    vae, x = stage(), images(12)
    folded = fold_whitening(vae, measure_covariance(vae, [x], Processes()))
    posterior, draw = folded.encode(x).latent_dist, torch.Generator().manual_seed(0)
    sums = CovarianceSums(4)
    for _ in range(200):
        sums.update(posterior.sample(draw), None)
    found = sums.merged(Processes()).total
    torch.testing.assert_close(found, torch.eye(4).double(), atol=0.03, rtol=0)


def test_the_moments_are_those_of_numpy():
    mean, logvar = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    sums = CovarianceSums(3)
    for part in (slice(0, 2), slice(2, 5)):
        sums.update(mean[part], logvar[part])
    found = sums.merged(Processes())
    rows = mean.movedim(1, -1).reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(found.signal, np.cov(rows.T, bias=True))
    np.testing.assert_allclose(found.noise, logvar.double().exp().mean((0, 2, 3)))


def white(channels: int) -> LatentCovariance:
    one = torch.ones(channels).double()
    return LatentCovariance(0 * one, torch.diag(one), 0 * one)


@pytest.mark.parametrize(("model", "words"), [
    (lambda: AutoencoderTiny(), "AutoencoderTiny"),
    (lambda: AutoencoderDC(latent_channels=4, encoder_block_out_channels=(4, 8),
                           decoder_block_out_channels=(4, 8), attention_head_dim=4,
                           encoder_block_types="ResBlock", decoder_block_types="ResBlock",
                           encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                           encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ())),
     "AutoencoderDC"),
    (lambda: VQModel(norm_num_groups=4, block_out_channels=(8,)), "codebook"),
])  # fmt: skip
def test_without_1x1_convolutions_it_is_refused(model, words):
    with pytest.raises(UserError, match=words):
        fold_whitening(model(), white(4))


def test_latents_that_lie_in_a_plane_are_refused():
    flat = white(4)
    flat.signal[3, 3] = 0.0
    with pytest.raises(UserError, match="3 of 4 directions"):
        fold_whitening(stage(), flat)
    with pytest.raises(UserError, match="of 3 channels"):
        fold_whitening(stage(), white(3))


def test_the_command_whitens_with_images_and_with_a_cache(tmp_path):
    vae, x = stage(), images()
    vae.save_pretrained(tmp_path / "stage")
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(number, 16, 16).save(tmp_path / f"images/{number}.png")
    source = open_source(str(tmp_path / "images"))
    options = CacheOptions(16, 16, dtype="float32")
    precompute(vae, str(tmp_path / "stage"), source, tmp_path / "cache", options)
    for name, way in (
        ("by-images", ("--data.path", tmp_path / "images", "--data.resolution", 16)),
        ("by-cache", ("--latents", tmp_path / "cache")),
    ):
        result = run_script(
            "scripts/export.py", "--first_stage", tmp_path / "stage", "--whiten",
            "--output", tmp_path / name, *way,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        folded = AutoencoderKL.from_pretrained(tmp_path / name)
        again = measure_covariance(folded, [x], Processes())
        torch.testing.assert_close(again.total, torch.eye(4).double(), atol=1e-3, rtol=0)
        assert "repeated others" in result.stdout
    standard = json.loads((tmp_path / "by-cache/latent_statistics.json").read_text())
    assert standard["std"] == [1.0] * 4
    refused = run_script(
        "scripts/export.py", "--first_stage", tmp_path / "stage", "--whiten", "--output",
        tmp_path / "no",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--data.path" in refused.stderr
