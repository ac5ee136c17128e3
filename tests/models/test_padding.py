"""Decoders that pad by reflection: which convolutions, how it is carried, and what is refused."""

import json

import pytest
import torch
from autoencoders import build_autoencoder, tiny_dc, tiny_kl
from public_families import public_family
from public_shapes import public_autoencoder
from torch import nn
from torch.nn import functional as F

from first_stage.errors import UserError
from first_stage.handover.card import load_snippet
from first_stage.handover.folding import fold_statistics
from first_stage.handover.single_file import programs, put_into, write_single_file
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.models.padding import padding_of, set_padding

LATENTS = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def reflecting(quant_conv: bool = True):
    torch.manual_seed(0)
    model = build_autoencoder(3, 4, (8, 16), 1, 4, False, quant_conv, 16).eval()
    set_padding(model, "reflect")
    return model


@torch.no_grad()
def test_a_convolution_of_the_decoder_sees_the_image_reflected():
    model = reflecting()
    conv, x = model.decoder.conv_in, LATENTS
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert torch.equal(conv(x), F.conv2d(padded, conv.weight, conv.bias))
    for half, mode in ((model.encoder, "zeros"), (model.decoder, "reflect")):
        convs = [m for m in half.modules() if isinstance(m, nn.Conv2d)]
        assert {m.padding_mode for m in convs if m.padding != (0, 0)} == {mode}
        assert {m.padding_mode for m in convs if m.padding == (0, 0)} <= {"zeros"}


@torch.no_grad()
@pytest.mark.parametrize("file", ["", "diffusion_pytorch_model.safetensors"])
def test_a_folder_carries_it_and_stock_diffusers_needs_two_lines(file, tmp_path):
    model = reflecting()
    model.save_pretrained(tmp_path)
    here = load_autoencoder(str(tmp_path / file))
    wanted = FirstStage(model).decode(LATENTS)
    assert torch.equal(FirstStage(here).decode(LATENTS), wanted)
    names: dict = {}
    lines = load_snippet(FirstStage(here), str(tmp_path)).splitlines()
    exec("\n".join(lines[:3]), names)  # as loaded, without them
    assert lines[2].startswith("vae =")
    assert not torch.equal(names["vae"].decode(LATENTS).sample, wanted)
    exec("\n".join(lines[3:5]), names)
    assert torch.equal(names["vae"].decode(LATENTS).sample, wanted)


@torch.no_grad()
def test_going_back_to_zeros_leaves_nothing(tmp_path):
    model = tiny_kl()
    before, config = FirstStage(model).decode(LATENTS), dict(model.config)
    set_padding(model, "reflect")
    assert not torch.equal(FirstStage(model).decode(LATENTS), before)
    set_padding(model, "zeros")
    assert torch.equal(FirstStage(model).decode(LATENTS), before)
    assert dict(model.config) == config


@torch.no_grad()
@pytest.mark.parametrize("name", ["vq_f4", "flux2", "tiny", "hunyuan_image", "dc"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 2)])
def test_images_of_any_size_are_decoded(name, size):
    if name == "dc":
        model = tiny_dc()
    else:
        model = public_family(name) if name == "hunyuan_image" else public_autoencoder(name)
    set_padding(model, "reflect")
    stage = FirstStage(model)
    latents = torch.randn(1, stage.latent_channels, *size)
    factor = stage.downsample_factor
    assert stage.decode(latents).shape == (1, 3, factor * size[0], factor * size[1])


@torch.no_grad()
def test_folding_keeps_it():
    model = reflecting(quant_conv=False)
    folded = fold_statistics(model, [0.5] * 4, [2.0] * 4)
    assert padding_of(folded) == "reflect"
    wanted = FirstStage(model).decode(LATENTS)
    torch.testing.assert_close(FirstStage(folded).decode((LATENTS - 0.5) / 2), wanted)


def test_files_that_cannot_say_it_are_not_written(tmp_path):
    model = reflecting()
    with pytest.raises(UserError, match="--layout ldm: this decoder pads by reflection"):
        write_single_file(model, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--into: this decoder pads by reflection"):
        put_into(model, tmp_path / "whole.safetensors", tmp_path / "x.safetensors")
    assert programs(model).startswith("none: they decode with zeros")
    assert not list(tmp_path.iterdir())


def test_what_no_one_can_read_is_refused(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_padding": "circular"}))
    with pytest.raises(UserError, match="decoder_padding 'circular': it can be zeros or reflect"):
        load_autoencoder(str(tmp_path))
