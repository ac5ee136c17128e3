"""Every Python snippet of the README and the pages runs, as it stands there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from autoencoders import build_autoencoder, tiny_vq
from conftest import ROOT, picture
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from pipelines import sample, stable_diffusion_xl

from first_stage.commands import export
from first_stage.data import open_source
from first_stage.distributed.processes import Processes
from first_stage.handover.export import write_export
from first_stage.handover.statistics import measure_latents
from latent_tools import CacheOptions, precompute
from latent_tools.__main__ import main as latent_tools_main

PAGES = [
    ROOT / "README.md",
    *(
        page
        for part in ("tutorials", "guides", "concepts")
        for page in sorted((ROOT / "docs" / part).glob("*.md"))
        if page.name != "diffusion-loops.md"  # whose loops have a test of their own
    ),
]


def snippets(page: Path, language: str) -> list[str]:
    """A page's fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def snippet(page: str, language: str, word: str) -> str:
    (found,) = [text for text in snippets(ROOT / page, language) if word in text]
    return found


PYTHON = [
    pytest.param(text, id=f"{page.stem}-{k}")
    for page in PAGES
    for k, text in enumerate(snippets(page, "python"))
]


def transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with all that the snippets name."""
    folder = tmp_path_factory.mktemp("snippets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).eval()
        for number in range(4):
            path = folder / f"images/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number, 16, 16).save(path)
        measured = measure_latents(vae, [torch.rand(4, 3, 16, 16) * 2 - 1], Processes())
        for run in ("demo", "before", "mine"):
            write_export(vae, measured, folder / f"runs/{run}/export", {})
        shutil.copytree("images", "path/to/images")
        Path("runs/look").mkdir()
        precompute(vae, "runs/demo/export", open_source("images"), "my_latents",
                   CacheOptions(resolution=16, resize=16, flip=True))  # fmt: skip
        codes = tiny_vq()
        measured = measure_latents(codes, [torch.rand(4, 3, 16, 16) * 2 - 1], Processes())
        write_export(codes, measured, folder / "runs/codes/export", {})
        precompute(codes, "runs/codes/export", open_source("images"), "my_tokens",
                   CacheOptions(resolution=16, resize=16, representation="tokens"))  # fmt: skip
        first_stage = AutoencoderKL.from_pretrained("runs/demo/export")
        pipeline = DiTPipeline(
            transformer=transformer(), vae=first_stage, scheduler=DDIMScheduler()
        )
        pipeline.save_pretrained("runs/digits/diffusion/pipeline")
        stable_diffusion_xl(first_stage)[0].save_pretrained("my_model")
        line = shlex.split(snippet("docs/guides/use-in-diffusers.md", "bash", "--fold_statistics"))
        assert line[:2] == ["first-stage", "export"]
        export.main(line[2:])
    return folder


@pytest.fixture
def place(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run(text: str, model: torch.nn.Module | None = None) -> dict:
    """Run a snippet among what its page takes for granted."""
    torch.manual_seed(1)
    model = model or transformer()
    names = {
        "images": torch.rand(2, 3, 16, 16) * 2 - 1,
        "epochs": 2,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
        "scheduler": DDIMScheduler(),
    }
    exec(text, names)
    return names


@pytest.mark.parametrize("text", PYTHON)
def test_it_runs(place, text):
    names = run(text)
    for name, value in names.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.isfinite().all(), name


def test_there_are_snippets():
    assert len(PYTHON) >= 10


def test_the_scaled_latents_are_as_promised(place):
    names = run(snippet("docs/guides/latents-unit-variance.md", "python", "scaling_factor"))
    scaled = (names["raw"] - names["vae"].config.shift_factor) * names["vae"].config.scaling_factor
    assert torch.equal(names["latents"], scaled)


def test_sampling(place):
    names = run(snippet("docs/tutorials/digits-to-diffusion.md", "python", "DiTPipeline"))
    assert [image.size for image in names["images"]] == [(16, 16)] * 3


def test_training_loop(place):
    names = run(snippet("docs/guides/read-the-cache.md", "python", "noise = torch"))
    torch.manual_seed(1)
    before = transformer()
    assert names["loss"].isfinite()
    assert names["clean"].shape == (4, 4, 8, 8)
    after = names["model"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after, strict=True))


def test_training_loop_without_labels(made, tmp_path, monkeypatch):
    """A cache of a flat folder, and what the page says to leave out."""
    page = "docs/guides/read-the-cache.md"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "runs/demo", "runs/demo")
    Path("flat").mkdir()
    for number in range(4):
        picture(number, 16, 16).save(f"flat/{number}.png")
    vae = AutoencoderKL.from_pretrained("runs/demo/export")
    precompute(vae, "runs/demo/export", open_source("flat"), "my_latents",
               CacheOptions(resolution=16, resize=16, flip=True))  # fmt: skip
    text = (ROOT / page).read_text(encoding="utf-8")
    for words in ("set_epoch(epoch)  # new posterior", "noise = torch"):
        with pytest.raises(KeyError, match="label"):
            run(snippet(page, "python", words))
    (alone,) = re.findall(r'`(z = batch\["latents"\])`', text)
    first = snippet(page, "python", "set_epoch(epoch)  # new posterior")
    assert run(re.sub(r"z, label = .*", alone, first))["z"].shape == (4, 4, 8, 8)
    (argument,) = re.findall(r"eave out `([^`]*)`", text)
    loop = snippet(page, "python", "noise = torch")
    assert argument in loop
    model = UNet2DModel(
        8, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    assert run(loop.replace(argument, ""), model)["loss"].isfinite()


def test_another_pipeline_with_a_folded_first_stage(place):
    """XL may be saved without text encoders; test_pipelines has the others."""
    names = run(snippet("docs/guides/use-in-diffusers.md", "python", "DiffusionPipeline.from"))
    assert names["pipeline"].vae.config.scaling_factor == 1.0
    assert names["pipeline"].vae.config.shift_factor == 0.0
    # The pipeline as the snippet loaded it decodes the latents as they are.
    latents, pictures = sample(
        lambda vae: (names["pipeline"], stable_diffusion_xl(vae)[1]), names["pipeline"].vae
    )
    with torch.no_grad():
        expected = (names["vae"].decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)


def test_export_to_another_trainer(place):
    line = shlex.split(snippet("docs/guides/other-trainers.md", "bash", "latents export"))
    assert line[:2] == ["first-stage", "latents"]
    latent_tools_main(line[2:])
    assert len(list(Path("my_latents_mar").rglob("*.npz"))) == 4


def test_tokens_are_read_and_decoded(place):
    names = run(snippet("docs/guides/which-first-stage.md", "python", "decode_preview"))
    assert names["first"].shape == (8, 8)
    assert names["image"].shape == (3, 16, 16)


@pytest.mark.parametrize("page", [
    "README.md", "docs/tutorials/digits-to-diffusion.md", "docs/tutorials/digits-to-tokens.md",
])  # fmt: skip
def test_targets_are_there(page):
    rules = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(snippets(ROOT / page, "bash")), re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target
