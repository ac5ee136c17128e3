"""Every snippet of the README's section on diffusion runs, as it stands there."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from autoencoders import build_autoencoder
from conftest import ROOT, picture
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from pipelines import sample, stable_diffusion_xl

from first_stage.data import open_source
from first_stage.distributed.processes import Processes
from first_stage.handover.export import measure_latents, write_export
from latent_tools import CacheOptions, precompute
from latent_tools.__main__ import main as latent_tools_main

HEADING = "## From the latents to pictures"


def snippets(language: str) -> list[str]:
    """The section's fenced blocks in a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index(HEADING) :].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def snippet(language: str, word: str) -> str:
    (found,) = [text for text in snippets(language) if word in text]
    return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with what the snippets name: runs/demo/export and my_latents."""
    torch.manual_seed(0)
    vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).eval()
    for number in range(4):
        path = tmp_path / f"images/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 16, 16).save(path)
    measured = measure_latents(vae, [torch.rand(4, 3, 16, 16) * 2 - 1], Processes())
    write_export(vae, measured, tmp_path / "runs/demo/export", {})
    monkeypatch.chdir(tmp_path)
    precompute(vae, "runs/demo/export", open_source("images"), "my_latents",
               CacheOptions(16, 16, flip=True))  # fmt: skip
    return tmp_path


def test_there_is_no_other_snippet():
    assert len(snippets("python")) == 3
    assert len(snippets("bash")) == 3


def transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


def test_sampling(place):
    vae = AutoencoderKL.from_pretrained("runs/demo/export")
    pipeline = DiTPipeline(transformer=transformer(), vae=vae, scheduler=DDIMScheduler())
    pipeline.save_pretrained("runs/digits/diffusion/pipeline")
    names: dict = {}
    exec(snippet("python", "DiTPipeline"), names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 3


def test_training_loop(place):
    model = transformer()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    names = {"epochs": 2, "model": model, "optimizer": optimizer, "scheduler": DDIMScheduler()}
    exec(snippet("python", "def collate"), names)
    assert names["loss"].isfinite()
    assert names["clean"].shape == (4, 4, 8, 8)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )  # fmt: skip


def test_another_pipeline_with_a_folded_first_stage(place, monkeypatch):
    """XL may be saved without text encoders; test_pipelines has the others."""
    line = shlex.split(snippet("bash", "--fold_statistics"))
    assert line[0] == "python"
    monkeypatch.setattr(sys, "argv", [str(ROOT / line[1]), *line[2:]])
    runpy.run_path(str(ROOT / line[1]), run_name="__main__")
    stable_diffusion_xl(AutoencoderKL.from_pretrained("runs/demo/export"))[0].save_pretrained(
        "my_model"
    )
    names: dict = {}
    exec(snippet("python", "DiffusionPipeline.from"), names)
    assert names["pipeline"].vae.config.scaling_factor == 1.0
    assert names["pipeline"].vae.config.shift_factor == 0.0
    # The pipeline as the snippet loaded it decodes the latents as they are.
    latents, pictures = sample(
        lambda vae: (names["pipeline"], stable_diffusion_xl(vae)[1]), names["pipeline"].vae
    )
    with torch.no_grad():
        expected = (names["vae"].decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)


def test_export(place):
    line = shlex.split(snippet("bash", "latent_tools export"))
    assert line[:3] == ["python", "-m", "latent_tools"]
    latent_tools_main(line[3:])
    assert len(list(Path("my_latents_mar").rglob("*.npz"))) == 4


def test_the_demo_is_a_target():
    (target,) = re.findall(r"^make (\S+)", snippet("bash", "make "), re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
