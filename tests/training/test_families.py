"""Every family trains, goes on, is exported and loads in stock diffusers."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import ROOT, arguments
from test_resume import contents, train_until

from first_stage.config import parse_config
from first_stage.errors import ConfigError
from first_stage.files import read_log
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.loop import train

FAMILIES = {
    "vq": {"model.family": "vq", "model.vq.codes": 24, "model.vq.restart_after": 2},
    "cosine": {"model.family": "vq", "model.vq.rule": "cosine", "model.vq.codes": 24,
               "model.vq.gradient": "rotation", "model.vq.restart_after": 2},
    "linear": {"model.family": "vq", "model.vq.rule": "linear", "model.vq.codes": 24},
    "fsq": {"model.family": "fsq", "model.fsq.levels": "[4,3,3]"},
    "dc": {"model.family": "dc", "model.dc.attention_levels": 1, "model.dc.head_dim": 4,
           "loss.penalties": "{magnitude: 0.01}"},
    "tiny": {"model.family": "tiny", "model.block_out_channels": "[8,8]"},
}  # fmt: skip
CLASSES = {"dc": "AutoencoderDC", "tiny": "AutoencoderTiny"}
STEPS = 6
RUN = {
    "train.max_steps": STEPS,
    "train.micro_batch_size": 2,
    "train.log_every": 2,
    "train.ema_decay": 0.9,
    "validation.every": 3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_n_and_n_steps_are_2n_bit_for_bit(tmp_path, images, monkeypatch, family):
    """Codes, usage, their average, log, pictures and export; then stock diffusers loads it."""
    fields = {**RUN, **FAMILIES[family]}
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    assert train(parse_config(arguments("run", images, **fields))).finished

    monkeypatch.chdir(tmp_path / "stopped")
    stopped = train_until(parse_config(arguments("run", images, **fields)), 3)
    assert (stopped.finished, stopped.step) == (False, 3)
    assert train(parse_config(["--config", "run/config.yaml", "--resume", "latest"])).finished

    expected = contents(tmp_path / "undisturbed" / "run")
    found = contents(tmp_path / "stopped" / "run")
    assert {n: h for n, h in found.items() if "step-000003/" not in n} == expected
    check_export(tmp_path / "stopped" / "run", CLASSES.get(family, "VQModel"))
    last = read_log(Path("run/log.jsonl"))[-3]
    assert ("codes/used" in last) == (family not in CLASSES)
    for name in ("codes", "tokens"):
        assert Path(f"run/pictures/{name}.png").exists() == (family not in CLASSES)
    card = Path("run/export/README.md").read_text()
    assert ("codes are not used" in " ".join(card.split())) == (family not in CLASSES)


@torch.no_grad()
def check_export(run: Path, name: str) -> None:
    """The stock class gives the codes and pictures that training's own forward gives."""
    folder = run / "export"
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == name
    assert 0 < config["scaling_factor"] != 0.18215
    stock = getattr(diffusers, name).from_pretrained(folder).eval()
    stage = FirstStage(load_autoencoder(str(folder)))
    side = 8 * stage.downsample_factor
    images = torch.rand(2, 3, side, side) * 2 - 1
    encoded = stage.encode(images).latents
    theirs = getattr(stock.encode(images), "latent" if name == "AutoencoderDC" else "latents")
    assert torch.equal(encoded, theirs)
    # In float64, where the order of sums plays no part.
    ours = FirstStage(load_autoencoder(str(folder)).double()).decode(encoded.double())
    pictures = stock.double().decode(theirs.double()).sample
    torch.testing.assert_close(ours.double(), pictures, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "words"), [
    ("tiny", "skips the step from [-1, 1] to [0, 1]"),
    ("vq", "no gradient checkpointing for VQModel"),
    ("dc", "no gradient checkpointing for AutoencoderDC"),
])  # fmt: skip
def test_gradient_checkpointing_is_refused_with_the_reason(tmp_path, images, family, words):
    fields = {**RUN, **FAMILIES[family], "model.gradient_checkpointing": "true"}
    with pytest.raises(ConfigError) as caught:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    assert words in str(caught.value)
    assert "model.gradient_checkpointing" in str(caught.value)


def test_a_trained_codebook_and_a_trained_grid_are_trained_on(tmp_path, images):
    for family in ("vq", "fsq"):
        fields = {**RUN, **FAMILIES[family], "train.max_steps": 2}
        train(parse_config(arguments(tmp_path / family, images, **fields)))
        fields |= {"model.pretrained": tmp_path / family / "export", "model.vq.restart_after": 0}
        train(parse_config(arguments(tmp_path / f"{family}-on", images, **fields)))
        before, after = (
            load_autoencoder(str(tmp_path / name / "export")).quantize.embedding.weight
            for name in (family, f"{family}-on")
        )
        assert torch.equal(before, after) == (family == "fsq")
        torch.testing.assert_close(before, after, rtol=0, atol=0.1)
    fields["model.fsq.levels"] = "[5,3,3]"
    with pytest.raises(ConfigError, match="carries another codebook"):
        train(parse_config(arguments(tmp_path / "other", images, **fields)))


def test_penalties_are_those_of_the_bottleneck(tmp_path, images):
    fields = {**RUN, **FAMILIES["tiny"], "loss.penalties": "{commitment: 1}"}
    with pytest.raises(ConfigError, match="bottleneck has: magnitude"):
        train(parse_config(arguments(tmp_path / "run", images, **fields)))


SMALL = {"train.max_steps": 2, "train.batch_size": 2, "train.warmup_steps": 0,
         "train.decay_steps": 0, "train.precision": "no", "train.tracker": "none",
         "train.encoder_steps": None, "train.log_every": 1, "critic.start_step": 0,
         "loss.learned.start_step": 0, "loss.adversarial.start_step": 0, "data.workers": 0,
         "validation.every": 2, "validation.images": 2, "validation.resolution": None,
         "export.images": 2}  # fmt: skip
DEMOS = ["demo_vq", "demo_fsq", "demo_dc", "demo_tiny"]
LARGE = ["vq_f8", "vq_f16", "fsq_f8", "dc_f32", "tiny_f8"]


def shrunk(widths: tuple[int, ...]) -> list[int]:
    return [max(width // 16, 8) for width in widths]


@pytest.mark.parametrize("name", [*DEMOS, *(pytest.param(n, marks=pytest.mark.slow)
                                            for n in LARGE)])  # fmt: skip
def test_the_recipes_train(tmp_path, images, name):
    """As they are, for two steps; the large ones with a sixteenth of their widths."""
    recipe = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.path", str(images)]
    model = parse_config(recipe).model
    fields = {**SMALL, "output_dir": tmp_path / "run", "data.validation_share": 0.25}
    if name in LARGE:
        widths = shrunk(model.block_out_channels)
        if model.family == "tiny":
            widths = [8] * len(widths)
        fields |= {"model.block_out_channels": widths, "model.norm_num_groups": 4,
                   "model.layers_per_block": 1, "critic.width": 4,
                   "data.resolution": 64}  # fmt: skip
        if model.family == "dc":
            fields |= {"model.latent_channels": 8, "model.dc.head_dim": 8}
    for field, value in fields.items():
        recipe += [f"--{field}", "null" if value is None else str(value)]
    assert train(parse_config(recipe)).finished
    check_export(tmp_path / "run", CLASSES.get(model.family, "VQModel"))
