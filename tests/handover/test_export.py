import json
import os
import subprocess
import sys

import pytest
import torch
from autoencoders import build_autoencoder
from conftest import ROOT
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from first_stage.distributed.processes import Processes
from first_stage.handover.card import model_card
from first_stage.handover.export import write_export
from first_stage.handover.statistics import measure_latents

STOCK = ROOT / "tests" / "helpers" / "stock_diffusers.py"


def tiny_vae(**overrides):
    torch.manual_seed(1)
    options = {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_attention": True,
        "quant_conv": True,
        "sample_size": 16,
    }
    return build_autoencoder(**{**options, **overrides}).eval()


def exported(vae, folder, images):
    statistics = measure_latents(vae, images.split(3), Processes())
    card = model_card(vae, statistics, "data", "seed: 0", {"psnr": 20.0}, 5, 20, None)
    write_export(vae, statistics, folder, {"README.md": card})
    return statistics


@torch.no_grad()
def test_the_statistics_are_those_of_posterior_samples(tmp_path):
    vae, images = tiny_vae(), torch.rand(8, 3, 16, 16) * 2 - 1
    statistics = measure_latents(vae, images.split(3), Processes())
    posterior = vae.encode(images).latent_dist
    torch.manual_seed(0)
    samples = torch.cat([posterior.sample() for _ in range(4000)]).double()
    assert statistics.images == 8
    assert statistics.mean == pytest.approx(samples.mean((0, 2, 3)).tolist(), abs=3e-3)
    assert statistics.std == pytest.approx(samples.std((0, 2, 3)).tolist(), rel=3e-3)
    assert statistics.overall_mean == pytest.approx(samples.mean().item(), abs=3e-3)
    assert statistics.overall_std == pytest.approx(samples.std().item(), rel=3e-3)


def test_the_config_holds_what_was_measured_and_scaled_latents_are_standard(tmp_path):
    vae, images = tiny_vae(), torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():  # a first stage whose latents are neither centred nor of unit scale
        vae.quant_conv.weight.mul_(3)
        vae.quant_conv.bias[:4].add_(2)
    exported(vae, tmp_path / "export", images)
    config = json.loads((tmp_path / "export/config.json").read_text())
    posterior = vae.encode(images).latent_dist
    second = (posterior.mean**2 + posterior.var).mean() - posterior.mean.mean() ** 2
    assert config["shift_factor"] == pytest.approx(posterior.mean.mean().item(), rel=1e-4)
    assert config["scaling_factor"] == pytest.approx(second.item() ** -0.5, rel=1e-4)
    # Stable Diffusion XL's pipeline would multiply by these on top of the scaling factor.
    assert config["latents_mean"] is None
    assert config["latents_std"] is None
    measured = json.loads((tmp_path / "export/latent_statistics.json").read_text())
    assert len(measured["mean"]) == len(measured["std"]) == 4
    assert config["shift_factor"] > 1
    assert not list((tmp_path / "export").glob("*.bin"))


def test_the_card_loads_warns_by_name_and_shows_the_recipe(tmp_path):
    vae, images = tiny_vae(), torch.rand(4, 3, 16, 16) * 2 - 1
    exported(vae, tmp_path / "export", images)
    card = (tmp_path / "export/README.md").read_text()
    for word in (
        "AutoencoderKL.from_pretrained",
        "StableDiffusionXLPipeline",
        "DiTPipeline",
        "shift_factor",
        "--fold_statistics",
        "seed: 0",
        "psnr",
    ):
        assert word in card


@pytest.mark.parametrize(("scale", "expected"), [(1.0, False), (1e5, True)])
def test_force_upcast_follows_the_largest_activation(scale, expected):
    vae, images = tiny_vae(), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(scale)
    statistics = measure_latents(vae, [images], Processes())
    assert statistics.needs_float32 is expected
    # The measurement itself leaves no hooks behind.
    assert not any(m._forward_hooks for m in vae.modules())


def test_stock_diffusers_gives_the_same_bits_and_pipelines_run(tmp_path):
    """Another process, with nothing of ours on its path, loads the export and runs pipelines."""
    vae, images = tiny_vae(), torch.rand(2, 3, 16, 16) * 2 - 1
    exported(vae, tmp_path / "export", images)
    save_file({"images": images}, tmp_path / "images.safetensors")
    result = subprocess.run(
        [sys.executable, str(STOCK), str(tmp_path)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert torch.equal(found["moments"], posterior.parameters)
        assert torch.equal(found["decoded"], vae.decode(posterior.mean).sample)
    assert found["dit"].shape == (2, 16, 16, 3)
    assert found["stable_diffusion"].shape == (1, 16, 16, 3)
    for name in ("dit", "stable_diffusion"):
        assert found[name].isfinite().all()
        assert found[name].std() > 0
    assert str(ROOT) not in result.stdout  # nothing of ours was imported


def test_an_export_replaces_the_one_before_it(tmp_path):
    vae, images = tiny_vae(), torch.rand(2, 3, 16, 16) * 2 - 1
    exported(vae, tmp_path / "export", images)
    (tmp_path / "export/old.txt").touch()
    exported(vae, tmp_path / "export", images)
    assert not (tmp_path / "export/old.txt").exists()
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "export"), AutoencoderKL)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
