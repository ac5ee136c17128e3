"""Whole runs, in process: files, logs, pictures, recipes, and what ends them."""

import json
import os

import pytest
import torch
from autoencoders import build_autoencoder
from conftest import ROOT, arguments, picture
from diffusers import AutoencoderKL
from PIL import Image

from first_stage.config import parse_config
from first_stage.errors import ConfigError, DataError, UserError
from first_stage.files import read_log
from first_stage.models.first_stage import FirstStage
from first_stage.training import loop
from first_stage.training.endings import TrainingDiverged
from first_stage.training.loop import train

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    every = {"validation__every": 2, "train__checkpoint_every": 2, "train__log_every": 2}
    outcome = train(tiny(train__max_steps=3, **every))
    run = tmp_path / "run"
    assert outcome.finished
    assert outcome.metrics.keys() == {"psnr", "ssim", "l1"}
    present = {p.name for p in run.iterdir()}
    assert present >= {
        *("config.yaml", "log.jsonl", "training.gif", "checkpoints", "export", "pictures"),
    }
    assert AutoencoderKL.from_pretrained(run / "export").config.scaling_factor != 0.18215
    frames = sorted(p.name for p in (run / "pictures").glob("step-*"))
    assert frames == [f"step-{s:06d}.png" for s in (0, 2, 3)]
    with Image.open(run / "pictures" / frames[0]) as grid:
        assert grid.size == (2 * 20 + 4, 2 * 20 + 4)
    with Image.open(run / "training.gif") as gif:
        assert gif.n_frames == 3
    log = read_log(run / "log.jsonl")
    assert [line["step"] for line in log if "loss/pixel" in line] == [2, 3]
    assert [line["step"] for line in log if "validation/psnr" in line] == [0, 2, 3]
    assert not list(run.rglob(".tmp-*"))


def test_checkpoints_rotate_and_hold_a_diffusers_folder(tiny, tmp_path):
    train(tiny(train__checkpoint_every=1, train__keep_checkpoints=2))
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]
    newest = tmp_path / "run/checkpoints/step-000004"
    averaged = AutoencoderKL.from_pretrained(newest / "ema")
    exported = AutoencoderKL.from_pretrained(tmp_path / "run/export")
    for key, value in exported.state_dict().items():
        assert torch.equal(averaged.state_dict()[key], value)
    assert not list(newest.rglob("*.pt"))
    assert not list(newest.rglob("*.bin"))


def test_the_log_survives_a_power_cut_as_far_as_a_checkpoint_relies_on_it(
    tiny, tmp_path, monkeypatch
):
    log, synced, missing = tmp_path / "run/log.jsonl", [], []
    fsync, save = os.fsync, loop.save_checkpoint

    def note(handle):
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def look(*given):
        missing.append((log.stat().st_ino, log.stat().st_size) not in synced)
        return save(*given)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(loop, "save_checkpoint", look)
    train(tiny(train__max_steps=2, train__checkpoint_every=1))
    assert missing == [False, False]


def test_an_earlier_run_is_never_lost_by_mistake(tiny, tmp_path):
    train(tiny(train__max_steps=1))
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds a run .*--resume latest"):
        train(tiny(train__max_steps=1))
    train(tiny(train__max_steps=2, overwrite=True))
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert read_log(tmp_path / "run/log.jsonl")[-1]["step"] == 2


def test_resuming_goes_on_where_it_stopped(tiny, tmp_path):
    train(tiny(output_dir=tmp_path / "whole"))
    train(tiny(output_dir=tmp_path / "parts", train__max_steps=2))
    train(tiny(output_dir=tmp_path / "parts", resume="latest"))
    weights = [
        AutoencoderKL.from_pretrained(tmp_path / name / "export").state_dict()
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resume_latest_without_a_checkpoint_starts(tiny, capsys):
    assert train(tiny(train__max_steps=1, resume="latest")).finished
    assert "starting at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=[p.stem for p in RECIPES])
def test_every_shipped_recipe_runs_two_steps(recipe, tmp_path, images):
    given = ["--config", str(recipe), "--data.path", str(images)]
    if "inflate_channels: true" in recipe.read_text():  # there has to be something to inflate
        build_autoencoder(3, 4, (8, 8, 8, 8), 1, 4, False, True, 16).save_pretrained(
            tmp_path / "pretrained"
        )
        given += ["--model.pretrained", str(tmp_path / "pretrained")]
    config = parse_config(given)
    # AutoencoderDC's shortcuts need latent channels that divide the last width.
    width = config.model.latent_channels if config.model.family == "dc" else 8
    widths = [width for _ in config.model.block_out_channels]
    side = 2 ** (len(widths) - 1) * 2
    shrunk = {
        "output_dir": tmp_path / "run",
        "data.path": images,
        "data.resolution": side,
        "data.workers": 0,
        "data.validation_share": 0.25,
        "model.block_out_channels": str(widths),
        "model.layers_per_block": 1,
        "model.norm_num_groups": 4,
        "critic.width": 4,
        "critic.layers": 1,
        "critic.start_step": 0,
        "loss.learned.start_step": 0,
        "loss.adversarial.start_step": 1,
        "train.max_steps": 2,
        "train.warmup_steps": 1,
        "train.decay_steps": 1,
        "train.batch_size": 2,
        "validation.resolution": side,
        "validation.images": 2,
        "export.images": 2,
    }
    if config.train.encoder_steps is not None:
        shrunk["train.encoder_steps"] = 1
    if config.data.late_resolution is not None:
        shrunk |= {"data.late_resolution": 2 * side, "data.late_steps": 1}
    for name, value in shrunk.items():
        given += [f"--{name}", str(value)]
    outcome = train(parse_config(given))
    assert outcome.finished
    assert (tmp_path / "run/export/config.json").exists()
    exported = json.loads((tmp_path / "run/export/config.json").read_text())
    for field in ("latent_channels", "in_channels"):
        assert exported[field] == getattr(config.model, field)
    if config.model.family == "kl":
        assert exported["use_quant_conv"] == config.model.quant_conv


def test_the_golden_loss_curve(tiny, tmp_path):
    """A change that only moves code leaves these numbers; one that changes them says so."""
    recipe = {"loss__learned__weight": 1.0, "loss__adversarial__weight": 0.1, "critic__layers": 2}
    train(tiny(train__max_steps=5, train__learning_rate=3e-3, **recipe))
    found = json.loads((ROOT / "tests/golden.json").read_text())
    log = [line for line in read_log(tmp_path / "run/log.jsonl") if "loss/pixel" in line]
    for name, values in found.items():
        assert [line[name] for line in log] == pytest.approx(values, rel=2e-3), name


def test_fine_tuning_a_pretrained_first_stage(tiny, tmp_path):
    torch.manual_seed(3)
    vae = build_autoencoder(3, 2, (4, 8, 8), 1, 4, False, False, 32)
    vae.save_pretrained(tmp_path / "pretrained")
    train(
        tiny(model__pretrained=tmp_path / "pretrained", train__learning_rate=1e-9,
             train__max_steps=1)
    )  # fmt: skip
    exported = AutoencoderKL.from_pretrained(tmp_path / "run/export")
    assert exported.config.latent_channels == 2
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(
        FirstStage(exported)(image)[0], FirstStage(vae)(image)[0], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ConfigError, match=r"model.in_channels is 1, but model.pretrained"):
        train(tiny(model__pretrained=tmp_path / "pretrained", model__in_channels=1, overwrite=True))


def test_fine_tuning_the_decoder_alone_keeps_what_latents_mean(tiny, tmp_path, capsys):
    torch.manual_seed(3)
    vae = build_autoencoder(3, 2, (4, 8), 1, 4, True, False, 16)
    vae.register_to_config(scaling_factor=0.18215, shift_factor=None)
    vae.save_pretrained(tmp_path / "pretrained")
    train(tiny(model__pretrained=tmp_path / "pretrained", train__encoder_steps=0))
    assert "the decoder learns alone from the start" in capsys.readouterr().out
    exported = AutoencoderKL.from_pretrained(tmp_path / "run/export")
    for name, value in vae.state_dict().items():
        same = torch.equal(exported.state_dict()[name], value)
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    assert (exported.config.scaling_factor, exported.config.shift_factor) == (0.18215, 0.0)
    card = (tmp_path / "run/export/README.md").read_text()
    assert "Only the decoder was trained" in card
    assert "`scaling_factor` 0.182150" in card


def test_a_resolution_that_a_pretrained_factor_does_not_divide(tiny, tmp_path):
    build_autoencoder(3, 2, (4, 8, 8, 8, 8, 8), 1, 4, False, False, 32).save_pretrained(
        tmp_path / "deep"
    )
    with pytest.raises(ConfigError, match=r"data.resolution \(16\).*downsample factor \(32\)"):
        train(tiny(model__pretrained=tmp_path / "deep"))


def test_what_blows_up_stops_the_run_by_name_and_saves_nothing(tiny, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"stopped being finite at step \d.*checkpoint"):
        train(tiny(train__learning_rate=1e30, train__max_steps=8, train__clip_norm=None,
                   train__checkpoint_every=1))  # fmt: skip
    for state in (tmp_path / "run/checkpoints").glob("*/first_stage.safetensors"):
        from safetensors.torch import load_file

        assert all(t.isfinite().all() for t in load_file(state).values())


def test_broken_files_are_listed_and_too_many_stop_the_run(tiny, images, tmp_path, capsys):
    (images / "90.png").write_bytes(b"rubbish")
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    picture(99).save(held_out / "a.png")
    config = tiny(data__validation_path=held_out, train__max_steps=6, data__max_broken=0.2)
    assert train(config).finished
    lines = (tmp_path / "run/broken_files.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["90.png"]
    assert "1 sample could not be decoded and was skipped (" in capsys.readouterr().out
    report = (tmp_path / "run/report.html").read_text()
    assert "1 sample could not be decoded and was skipped, such as 90.png" in report
    with pytest.raises(DataError, match=r"more than data.max_broken \(0.0\) allows"):
        train(tiny(data__validation_path=held_out, data__max_broken=0.0, overwrite=True))


def test_no_held_out_images_is_no_error(tiny, tmp_path):
    outcome = train(tiny(data__validation_share=0))
    assert outcome.finished
    assert outcome.metrics == {}
    assert (tmp_path / "run/training.gif").exists()


def test_default_flags_need_no_tracker_gpu_or_validation(images, tmp_path):
    shrink = ("resolution", "block_out", "groups", "layers", "width", "max_steps", "batch")
    line = arguments(tmp_path / "run", images)
    pairs = list(zip(line[::2], line[1::2], strict=True))
    kept = [p for p in pairs if any(word in p[0] for word in ("path", "output", *shrink))]
    assert train(parse_config([part for pair in kept for part in pair])).finished


def test_gray_and_alpha(tiny, tmp_path):
    for channels in (1, 4):
        run = tmp_path / f"c{channels}"
        assert train(tiny(output_dir=run, model__in_channels=channels)).finished
        exported = AutoencoderKL.from_pretrained(run / "export")
        assert exported.config.in_channels == exported.config.out_channels == channels


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, tmp_path):
    for name, on in (("plain", False), ("saving", True)):
        train(tiny(output_dir=tmp_path / name, model__gradient_checkpointing=on))
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("plain", "saving")]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
