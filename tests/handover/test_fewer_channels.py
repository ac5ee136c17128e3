"""Latent channels left out: what the others say, and what images become."""

import json

import numpy as np
import pytest
import torch
from autoencoders import build_autoencoder
from conftest import picture, run_script
from diffusers import AutoencoderKL, VQModel

from first_stage.errors import UserError
from first_stage.handover.fewer_channels import keep_channels
from first_stage.metrics.images import psnr
from first_stage.models.disturb import prefix
from first_stage.models.first_stage import FirstStage, reconstruct
from first_stage.models.padding import padding_of, set_padding

CHANNELS, KEPT = 6, 2


def stage(quant_conv: bool = True, bias: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = build_autoencoder(3, CHANNELS, (8, 16), 1, 4, False, quant_conv, 16).eval()
    for parameter in vae.parameters():  # biases and norms are not at their first values
        parameter.data += 0.05 * torch.randn_like(parameter)
    if quant_conv and not bias:
        vae.post_quant_conv.bias.data.zero_()
    return vae


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(count, 3, side, side) * 2 - 1


@pytest.mark.parametrize(("quant_conv", "bias", "padding"), [
    (True, True, "zeros"), (True, True, "reflect"), (True, False, "zeros"), (False, True, "zeros"),
])  # fmt: skip
@torch.no_grad()
def test_posteriors_are_the_same_and_images_those_of_zeros_behind(quant_conv, bias, padding):
    vae, x = stage(quant_conv, bias), images()
    set_padding(vae, padding)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    small = keep_channels(vae, KEPT)
    whole, few = vae.encode(x).latent_dist, small.encode(x).latent_dist
    torch.testing.assert_close(few.mean, whole.mean[:, :KEPT])
    torch.testing.assert_close(few.logvar, whole.logvar[:, :KEPT])
    assert padding_of(small) == padding
    if quant_conv and bias and padding == "zeros":
        # The outermost row differs, and group norms tell the rest of it.
        first = small.decoder.conv_in(small.post_quant_conv(few.mean))
        zeros_behind = prefix(whole.mean, torch.full((len(x),), KEPT))
        other = vae.decoder.conv_in(vae.post_quant_conv(zeros_behind))
        inside = (..., slice(1, -1), slice(1, -1))
        torch.testing.assert_close(first[inside], other[inside])
    else:
        masked = vae.decode(prefix(whole.mean, torch.full((len(x),), KEPT))).sample
        torch.testing.assert_close(small.decode(few.mean).sample, masked, atol=1e-5, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_the_config_has_the_statistics_of_those_kept():
    vae = stage()
    vae.register_to_config(latents_mean=[0.1 * n for n in range(CHANNELS)], scaling_factor=0.5)
    small = keep_channels(vae, KEPT)
    assert small.config.latent_channels == KEPT
    assert small.config.latents_mean == [0.0, 0.1]
    assert small.config.scaling_factor == 0.5


@pytest.mark.parametrize(("model", "count", "words"), [
    (lambda: VQModel(norm_num_groups=4, block_out_channels=(8,)), 1, "VQModel"),
    (stage, CHANNELS, "from 1 to 5"),
    (stage, 0, "from 1 to 5"),
])  # fmt: skip
def test_what_cannot_be_left_out_is_refused(model, count, words):
    with pytest.raises(UserError, match=words):
        keep_channels(model(), count)


@torch.no_grad()
def test_the_command_measures_what_it_costs_and_the_new_scale(tmp_path):
    vae = stage()
    vae.save_pretrained(tmp_path / "stage")
    known = {"mean": [1.0, 3.0, 9, 9, 9, 9], "std": [2.0, 2.0, 9, 9, 9, 9], "resolution": 16}
    (tmp_path / "stage/latent_statistics.json").write_text(json.dumps(known))
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number, 16, 16).save(tmp_path / f"images/{number}.png")
    data = ("--data.path", tmp_path / "images")
    command = ("scripts/export.py", "--first_stage", tmp_path / "stage")
    plain = run_script(*command, "--keep_channels", KEPT, "--output", tmp_path / "few", *data)
    assert plain.returncode == 0, plain.stderr
    few = AutoencoderKL.from_pretrained(tmp_path / "few")
    assert few.config.shift_factor == pytest.approx(2.0)
    assert few.config.scaling_factor == pytest.approx(5**-0.5)
    kept = json.loads((tmp_path / "few/latent_statistics.json").read_text())
    assert (kept["mean"], kept["std"], kept["resolution"]) == ([1, 3], [2, 2], 16)
    x = torch.stack([torch.from_numpy(_values(n)) for n in range(4)])
    shown = psnr(x, reconstruct(FirstStage(few), x)[0].clamp(-1, 1)).mean()
    assert f"the first 2 of 6 latent channels: PSNR {shown:.2f} dB on 4 images" in plain.stdout
    card = (tmp_path / "few/README.md").read_text()
    assert "2 latent channels" in card.splitlines()[0]
    assert "the first 2 of 6" in card
    white = run_script(
        *command, "--whiten", "--keep_channels", KEPT, "--output", tmp_path / "white", *data
    )
    assert white.returncode == 0, white.stderr
    few = AutoencoderKL.from_pretrained(tmp_path / "white")
    assert (few.config.latent_channels, few.config.scaling_factor) == (2, 1.0)
    latents = few.encode(x).latent_dist
    spread = latents.mean.var((0, 2, 3), correction=0) + latents.var.mean((0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(2), atol=1e-3, rtol=0)
    refused = run_script(*command, "--keep_channels", 6, "--output", tmp_path / "no")
    assert refused.returncode == 2
    assert "from 1 to 5" in refused.stderr


def _values(number: int) -> np.ndarray:
    return np.asarray(picture(number, 16, 16)).transpose(2, 0, 1).astype("float32") / 127.5 - 1
