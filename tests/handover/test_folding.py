"""Folding statistics into the 1x1 convolutions: the same pictures, standard latents."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from autoencoders import build_autoencoder
from conftest import ROOT, picture, run_script
from diffusers import AutoencoderKL, AutoencoderTiny

from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.handover.folding import fold_statistics
from first_stage.handover.statistics import measure_latents

MEAN, STD = [0.5, -3.0, 0.0, 20.0], [2.0, 0.1, 1.0, 7.0]


def stage(quant_conv: bool = True, seed: int = 0) -> AutoencoderKL:
    """A tiny autoencoder whose latents are far from standard."""
    torch.manual_seed(seed)
    vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, quant_conv, 16).eval()
    with torch.no_grad():
        out = vae.quant_conv if quant_conv else vae.encoder.conv_out
        out.bias[:4] += torch.tensor(MEAN)
        out.weight[:4] *= torch.tensor(STD)[:, None, None, None]
        out.bias[4:] -= 2.0
    return vae


def images(count: int = 6) -> torch.Tensor:
    pixels = np.stack([np.asarray(picture(n, 16, 16)) for n in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("quant_conv", [True, False])
@torch.no_grad()
def test_reconstruction_stays_and_the_posterior_is_mapped(quant_conv):
    vae, x = stage(quant_conv), images()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    folded = fold_statistics(vae, MEAN, STD)
    one, other = vae.encode(x).latent_dist, folded.encode(x).latent_dist
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    torch.testing.assert_close(other.mean, (one.mean - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.var, one.var / std**2, atol=0, rtol=1e-5)
    noise = torch.randn(one.mean.shape, generator=torch.Generator().manual_seed(1))
    pictures = vae.decode(one.mean + one.std * noise).sample
    again = folded.decode(other.mean + other.std * noise).sample
    assert (pictures - again).abs().max() < 1e-5
    # What was folded is a copy.
    assert set(before) == set(vae.state_dict())
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())


def test_latents_measure_mean_0_and_std_1():
    vae, x = stage(), images()
    measured = measure_latents(vae, [x], Processes())
    assert max(abs(np.array(measured.mean))) > 1  # there is something to fold
    folded = fold_statistics(vae, measured.mean, measured.std)
    again = measure_latents(folded, [x], Processes())
    np.testing.assert_allclose(again.mean, 0.0, atol=1e-5)
    np.testing.assert_allclose(again.std, 1.0, atol=1e-5)
    assert folded.config.scaling_factor == 1.0
    assert folded.config.shift_factor == 0.0
    assert folded.config.latents_mean is None
    assert folded.config.latents_std is None


def test_without_convolutions_it_gets_identity_ones_that_are_saved(tmp_path):
    vae, x = stage(quant_conv=False), images(2)
    assert vae.quant_conv is None
    folded = fold_statistics(vae, MEAN, STD)
    folded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_quant_conv"] is True
    assert config["use_post_quant_conv"] is True
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(x).sample, vae(x).sample, atol=1e-5, rtol=0
        )  # fmt: skip


def test_folding_twice_is_folding_once_more():
    """Statistics of folded latents fold again."""
    vae, x = stage(), images()
    folded = fold_statistics(fold_statistics(vae, MEAN, STD), [1.0] * 4, [2.0] * 4)
    mean = [m + s for m, s in zip(MEAN, STD, strict=True)]
    direct = fold_statistics(vae, mean, [2 * s for s in STD])
    with torch.no_grad():
        torch.testing.assert_close(
            folded.encode(x).latent_dist.parameters,
            direct.encode(x).latent_dist.parameters,
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ([0.0] * 3, [1.0] * 3, "4 latent channels"),
        ([0.0] * 4, [1.0, 1.0, 0.0, 1.0], "channel 2"),
        ([0.0, float("nan"), 0.0, 0.0], [1.0] * 4, "channel 1"),
        ([0.0] * 4, [1e-9, 1.0, 1.0, 1.0], "channel 0"),
    ],
)
def test_statistics_that_cannot_be_folded_are_refused(mean, std, words):
    with pytest.raises(UserError, match=words):
        fold_statistics(stage(), mean, std)


def test_only_an_autoencoder_kl_is_folded():
    with pytest.raises(UserError, match="AutoencoderTiny"):
        fold_statistics(AutoencoderTiny(), [0.0] * 4, [1.0] * 4)


def test_the_command_folds_an_export(tmp_path):
    """From the statistics that the export's config has, and from data."""
    vae, x = stage(), images()
    measured = measure_latents(vae, [x], Processes())
    vae.register_to_config(latents_mean=measured.mean, latents_std=measured.std)
    vae.save_pretrained(tmp_path / "export")
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture(number, 16, 16).save(tmp_path / f"images/{number}.png")
    result = run_script(
        "scripts/export.py", "--first_stage", tmp_path / "export", "--fold_statistics",
        "--output", tmp_path / "folded", "--data.path", tmp_path / "images",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    folded = AutoencoderKL.from_pretrained(tmp_path / "folded")
    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.0, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(folded(x).sample, vae(x).sample, atol=1e-5, rtol=0)
    again = measure_latents(folded, [x], Processes())
    np.testing.assert_allclose(again.mean, 0.0, atol=1e-4)
    np.testing.assert_allclose(again.std, 1.0, atol=1e-4)
    assert "scaling_factor 1" in result.stdout
    assert "AutoencoderKL.from_pretrained" in result.stdout


def test_the_command_needs_statistics(tmp_path, monkeypatch, capsys):
    stage().save_pretrained(tmp_path / "export")
    line = ["--first_stage", tmp_path / "export", "--fold_statistics", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, line)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/export.py"), run_name="__main__")
    assert ended.value.code == 2
    (told,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert "latents_mean" in told
    assert "--data.path" in told
    assert not (tmp_path / "out").exists()
