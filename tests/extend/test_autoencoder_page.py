"""docs/extend/autoencoder.md, followed from outside the library."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arguments
from pages import files_of, write_files

from first_stage.files import read_log

PAGE = "docs/extend/autoencoder.md"
CACHE = """
import patches

from first_stage.commands.cache import main
from first_stage.errors import run_command

run_command(main)
"""


@pytest.fixture
def run(tmp_path):
    write_files(PAGE, tmp_path)
    (tmp_path / "cache_patches.py").write_text(CACHE)

    def run(*line):
        return subprocess.run(
            [sys.executable, *map(str, line)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_a_toy_family_trains_resumes_validates_exports_and_caches(tmp_path, images, run):
    assert set(files_of(PAGE)) == {"patches.py", "train_patches.py"}
    line = arguments(
        tmp_path / "run", images, model__family="patches", model__patches__side=4,
        train__max_steps=3, train__checkpoint_every=1, validation__every=2,
    )  # fmt: skip
    trained = run("train_patches.py", *line)
    assert trained.returncode == 0, trained.stderr
    assert "f4, 4 latent channels" in trained.stdout

    longer = [*line, "--train.max_steps", "5", "--resume", "latest"]
    resumed = run("train_patches.py", *longer)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 3" in resumed.stdout
    log = read_log(tmp_path / "run/log.jsonl")
    assert {"loss/commitment", "share/pixel"} <= set(log[1])
    assert any("validation/psnr" in entry for entry in log)

    # The export is what the class itself loads, with the codes that were learned.
    check = (
        "import sys, torch; from patches import PatchAutoencoder\n"
        "model = PatchAutoencoder.from_pretrained(sys.argv[1])\n"
        "assert model.config.patch == 4 and model.config.scaling_factor > 0\n"
        "assert model.decode(model.encode(torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)\n"
    )
    loaded = run("-c", check, tmp_path / "run/export")
    assert loaded.returncode == 0, loaded.stderr

    cached = run(
        "cache_patches.py", "--first_stage", tmp_path / "run/export", "--data.path", images,
        "--data.resolution", 16, "--output", tmp_path / "cache", "--data.workers", 0,
    )  # fmt: skip
    assert cached.returncode == 0, cached.stderr
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["first_stage"]["class"] == "PatchAutoencoder"
    assert manifest["first_stage"]["downsample_factor"] == 4
    from latent_tools import LatentDataset

    dataset = LatentDataset(tmp_path / "cache")
    assert dataset[0]["latents"].shape == torch.Size([4, 4, 4])


def test_the_familys_fields_are_in_the_help_and_checked(run):
    helped = run("train_patches.py", "--help")
    assert "--model.patches.side" in helped.stdout
    assert "Side of a patch, in pixels." in helped.stdout
    wrong = run("train_patches.py", "--data.path", "x", "--model.family", "patchwork")
    assert wrong.returncode == 2
