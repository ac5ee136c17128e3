"""docs/extend/loss.md and critic.md, followed from outside the library."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, arguments
from pages import blocks_of, files_of, write_files

from first_stage.files import read_log
from first_stage.losses.adversarial import PAIRS

PAGE = "docs/extend/loss.md"


@pytest.fixture
def run(tmp_path):
    write_files(PAGE, tmp_path)

    def run(*line):
        return subprocess.run(
            [sys.executable, "train_smoothly.py", *map(str, line)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_a_toy_term_trains_and_appears_everywhere(tmp_path, images, run):
    line = arguments(tmp_path / "run", images, train__max_steps=4)
    trained = run(
        *line, "--loss.total_variation.weight", 0.3, "--loss.total_variation.start_step", 1
    )
    assert trained.returncode == 0, trained.stderr
    log = read_log(tmp_path / "run/log.jsonl")
    steps = [entry for entry in log if "loss/total_variation" in entry]
    assert len(steps) == 4
    assert "share/total_variation" not in steps[0]  # it enters at step 1
    assert 0 < steps[-1]["share/total_variation"] < 1
    assert sum(v for k, v in steps[-1].items() if k.startswith("share/")) == pytest.approx(1)
    assert "total_variation" in (tmp_path / "run/config.yaml").read_text()
    assert "total_variation" in (tmp_path / "run/report.html").read_text()


def test_it_can_be_balanced_by_shares(tmp_path, images, run):
    shares = "{pixel: 0.5, learned: 0.2, adversarial: 0.1, total_variation: 0.2}"
    line = arguments(
        tmp_path / "run", images, loss__balance__kind="shares", loss__balance__shares=shares
    )
    trained = run(*line, "--loss.total_variation.weight", 1)
    assert trained.returncode == 0, trained.stderr


def test_a_toy_term_of_the_latents_trains_and_is_logged(tmp_path, images, run):
    main = (tmp_path / "train_smoothly.py").read_text()
    (tmp_path / "train_smoothly.py").write_text("import small_latents\n" + main)
    line = arguments(tmp_path / "run", images, train__max_steps=3)
    trained = run(*line, "--loss.latent_size.weight", 0.3, "--loss.latent_size.start_step", 1)
    assert trained.returncode == 0, trained.stderr
    log = [e for e in read_log(tmp_path / "run/log.jsonl") if "loss/latent_size" in e]
    assert len(log) == 3
    assert log[0]["latent_share/latent_size"] == 0  # it enters at step 1
    assert 0 < log[-1]["latent_share/latent_size"] <= 1
    assert "share/latent_size" not in log[-1]
    assert "latent_size" in (tmp_path / "run/report.html").read_text()


def test_its_fields_are_in_the_help_and_checked(run):
    helped = run("--help")
    assert "--loss.total_variation.power" in helped.stdout
    assert "how ragged it is" in helped.stdout
    refused = run("--data.path", "x", "--loss.total_variation.weight", -1)
    assert refused.returncode == 2
    assert "loss.total_variation.weight is -1.0; it must be a float of 0 or above" in refused.stderr


def test_the_critics_page_runs(capsys):
    (pair,) = files_of("docs/extend/critic.md").values()
    (network,) = blocks_of("docs/extend/critic.md")
    try:
        exec(pair, {})
        found = PAIRS["exponential"]
        assert found.critic(torch.zeros(1), torch.zeros(1)).item() == 2
        assert found.generator(torch.zeros(1), torch.zeros(1)).item() == 1
    finally:
        PAIRS.pop("exponential", None)
    exec(network, {})
    assert "torch.Size([1, 2," in capsys.readouterr().out
