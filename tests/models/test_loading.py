"""Loading: every weight in its place, or refused by name."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from autoencoders import tiny_kl
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from public_shapes import public_autoencoder
from safetensors.torch import load_file, save_file

from first_stage import hub
from first_stage.errors import UserError
from first_stage.models import loading
from first_stage.models.loading import (
    fingerprint_weights,
    load_autoencoder,
    training_resolution,
)


def test_loading_a_folder_a_pipeline_and_other_kinds(tmp_path):
    vae = tiny_kl()
    vae.save_pretrained(tmp_path / "plain")
    vae.save_pretrained(tmp_path / "pipeline/vae")
    for name in ("plain", "pipeline"):
        loaded = load_autoencoder(str(tmp_path / name))
        assert isinstance(loaded, AutoencoderKL)
        assert not loaded.training
        for key, value in vae.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    small.save_pretrained(tmp_path / "tiny")
    loaded = load_autoencoder(str(tmp_path / "tiny"))
    assert isinstance(loaded, AutoencoderTiny)


def test_what_is_no_autoencoder_is_refused_in_one_line(tmp_path):
    UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text(json.dumps({"_class_name": "os"}))
    tiny_kl().save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for name, words in [
        ("unet", "no encode and decode"),
        ("empty", "neither config.json nor vae/config.json"),
        ("unknown", "names the class 'os'"),
        ("torn", "cannot be loaded"),
        ("nowhere", "does not exist"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            load_autoencoder(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_class_that_this_diffusers_lacks_is_named_with_the_remedy(tmp_path, monkeypatch):
    import diffusers

    monkeypatch.delitem(diffusers._class_to_module, "AutoencoderOobleck")
    monkeypatch.delattr(diffusers, "AutoencoderOobleck", raising=False)
    config = {"_class_name": "AutoencoderOobleck", "_diffusers_version": "9.0.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(tmp_path))
    told = str(caught.value)
    assert "is of the class AutoencoderOobleck, which diffusers 9.0.0 wrote" in told
    assert told.endswith(f"{diffusers.__version__} here does not have: pip install -U diffusers")
    assert "\n" not in told


def test_pickled_weights_are_never_loaded(tmp_path):
    tiny_kl().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(UserError, match=r"has no weights as .*, only diffusion_pytorch"):
        load_autoencoder(str(tmp_path))


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny autoencoder whose weights were changed; `saved(change)` is its folder."""

    def save(change, name="stage"):
        folder = tmp_path / name
        tiny_kl(attention=True).save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(change(load_file(file)), file)
        return str(folder)

    return save


MISFITS = {
    "no attention": (
        lambda w: {k: v for k, v in w.items() if "attentions" not in k},
        r"decoder\.mid_block\.attentions.* and \d+ more missing",
    ),
    "another layout": (
        lambda w: {k.replace("mid_block.resnets", "mid.block"): v for k, v in w.items()},
        r"missing; .*mid\.block.*unknown",
    ),
    "a part too many": (lambda w: {**w, "loss.logvar": torch.zeros(())}, r"loss\.logvar unknown"),
    "another shape": (
        lambda w: {**w, "quant_conv.weight": torch.zeros(8, 8, 3, 3)},
        r"quant_conv\.weight \(8, 8, 3, 3\) instead of \(8, 8, 1, 1\) of another shape",
    ),
    "two prefixes": (
        lambda w: {("module." if "encoder" in k else "_orig_mod.") + k: v for k, v in w.items()},
        r"missing; _orig_mod\..*unknown",
    ),
    "a prefix and a part missing": (
        lambda w: {"module." + k: v for k, v in w.items() if "quant_conv" not in k},
        r"quant_conv.*missing",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(saved, what):
    change, words = MISFITS[what]
    name = saved(change)
    with pytest.raises(UserError, match=words) as error:
        load_autoencoder(name, field="model.pretrained")
    assert str(error.value).startswith(f"model.pretrained {name!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_left_out_and_said(saved, prefix, caplog):
    name = saved(lambda weights: {prefix + key: value for key, value in weights.items()})
    with caplog.at_level(logging.WARNING):
        loaded = load_autoencoder(name, field="model.pretrained")
    assert f"the prefix {prefix} of its" in caplog.text
    for key, value in tiny_kl(attention=True).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert not any(p.is_meta for p in loaded.parameters())
    loaded(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, value):
    """Else an export hands them on, and a training ends at its first step."""
    name = saved(lambda w: {**w, "decoder.conv_out.bias": w["decoder.conv_out.bias"] + value})
    with pytest.raises(UserError, match=r"NaN or infinite values: decoder\.conv_out\.bias\."):
        load_autoencoder(name)


def test_old_names_of_attention_weights_are_known(saved):
    """As the first public weights have them."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(weights):
        for new, name in old.items():
            weights = {key.replace(new, name): value for key, value in weights.items()}
        return weights

    loaded = load_autoencoder(saved(rename))
    assert fingerprint_weights(loaded) == fingerprint_weights(tiny_kl(attention=True))


def test_the_folder_does_not_stay_in_the_config(saved, tmp_path):
    loaded = load_autoencoder(saved(dict))
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("name", ["nobody/no-such-first-stage", "runs/exprot"])
@pytest.mark.parametrize("reason", ["offline", "no name", "no answer"])
def test_without_a_network_it_says_at_once_what_is_true(monkeypatch, recwarn, name, reason):
    from huggingface_hub import constants

    def head(*_, **__):
        if reason == "no answer":
            time.sleep(60)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason == "offline")
    monkeypatch.setattr(hub, "_PATIENCE", 0.3)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: type("S", (), {"head": head}))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no such folder here, .* cannot be reached") as error:
        load_autoencoder(name, field="model.pretrained")
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize("kept", [5, 1000, -10])
def test_weights_that_are_cut_short_are_told_so(saved, kept):
    name = saved(dict)
    (weights,) = Path(name).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"are damaged or cut short .*: copy or download"):
        load_autoencoder(name)


def test_the_fingerprint_is_of_the_weights_alone(saved):
    one, other = load_autoencoder(saved(dict, "one")), load_autoencoder(saved(dict, "other"))
    other.to(memory_format=torch.channels_last)
    assert fingerprint_weights(one) == fingerprint_weights(other)
    with torch.no_grad():
        other.decoder.conv_out.bias[0] += 1e-6
    assert fingerprint_weights(one) != fingerprint_weights(other)


def test_the_training_resolution_is_not_the_tile(saved, tmp_path):
    name = saved(dict)
    loaded = load_autoencoder(name)
    assert training_resolution(name, loaded) == loaded.config.sample_size
    (tmp_path / "stage" / loading.STATISTICS_FILE).write_text(json.dumps({"resolution": 48}))
    assert training_resolution(name, loaded) == 48
    (tmp_path / "stage" / loading.STATISTICS_FILE).write_text("{")
    assert training_resolution(name, loaded) == loaded.config.sample_size


_ON_THE_HUB = """
from first_stage.models.loading import load_autoencoder, training_resolution
for name in ("some/stage", "some/pipeline@refs/pr/3", "some/other"):
    print(training_resolution(name, load_autoencoder(name)))
"""


def test_the_training_resolution_of_a_single_file_is_what_its_layout_says(tmp_path):
    model = public_autoencoder("sd")
    file = tmp_path / "x.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    assert training_resolution(str(file), load_autoencoder(str(file))) == 512


def test_the_training_resolution_of_a_first_stage_from_the_hub(saved, tmp_path):
    """From the hub's cache: nothing is reached."""
    names = {"stage": "", "pipeline": "vae", "other": ""}
    folder = saved(dict)
    for name, subfolder in names.items():
        repository = tmp_path / "hub" / f"models--some--{name}"
        (repository / "refs/refs/pr").mkdir(parents=True)
        for revision in ("main", "refs/pr/3"):
            (repository / "refs" / revision).write_text("0" * 40)
        place = repository / "snapshots" / ("0" * 40) / subfolder
        shutil.copytree(folder, place)
        if name != "other":
            (place / loading.STATISTICS_FILE).write_text(json.dumps({"resolution": 48}))
    done = subprocess.run(
        [sys.executable, "-c", _ON_THE_HUB], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    side = load_autoencoder(folder).config.sample_size
    assert done.stdout.split() == ["48", "48", str(side)], done.stderr
