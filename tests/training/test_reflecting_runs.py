"""A run whose decoder pads by reflection, from its first step to what is made of its export."""

import json

import pytest
import torch
from autoencoders import tiny_kl
from public_families import public_family

from first_stage.commands import export
from first_stage.errors import ConfigError
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.models.padding import padding_of
from first_stage.training.loop import train
from first_stage.training.players import make_first_stage

OFF = {"loss__learned__weight": 0, "loss__adversarial__weight": 0}


def weights(folder):
    return load_autoencoder(str(folder)).state_dict()


def test_it_lasts_through_checkpoints_exports_and_new_runs(tiny, tmp_path, capsys):
    fields = {"model__decoder_padding": "reflect", **OFF}
    train(tiny(output_dir=tmp_path / "whole", **fields))
    train(tiny(output_dir=tmp_path / "parts", train__max_steps=2, **fields))
    train(tiny(output_dir=tmp_path / "parts", resume="latest", **fields))
    train(tiny(output_dir=tmp_path / "zeros", **OFF))
    whole, parts, zeros = (weights(tmp_path / n / "export") for n in ("whole", "parts", "zeros"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert not torch.equal(whole["decoder.conv_in.weight"], zeros["decoder.conv_in.weight"])
    average = load_autoencoder(str(tmp_path / "whole/checkpoints/step-000004/ema"))
    assert padding_of(average) == "reflect"
    card = (tmp_path / "whole/export/README.md").read_text()
    assert "The decoder pads by reflection" in card
    assert "m.padding_mode = 'reflect'" in card
    assert "padding" not in (tmp_path / "zeros/export/README.md").read_text().split("## Recipe")[0]

    with pytest.raises(ConfigError, match="decoder_padding"):
        train(tiny(output_dir=tmp_path / "parts", resume="latest", train__max_steps=5, **OFF))
    begin = {"model__pretrained": tmp_path / "whole/export", "train__parts": "[decoder]", **OFF}
    train(tiny(output_dir=tmp_path / "on", train__max_steps=1, **begin))
    train(tiny(output_dir=tmp_path / "on", resume="latest", train__max_steps=2, **begin))
    assert padding_of(load_autoencoder(str(tmp_path / "on/export"))) == "reflect"
    started = make_first_stage(tiny(model__decoder_padding="zeros", **begin).model, 16)
    assert padding_of(started.model) == "zeros"
    capsys.readouterr()

    copy = tmp_path / "copy"
    export.main(["--first_stage", str(tmp_path / "on/export"), "--output", str(copy)])
    assert "m.padding_mode = 'reflect'" in capsys.readouterr().out
    assert "The decoder pads by reflection" in (copy / "README.md").read_text()
    one, other = (FirstStage(load_autoencoder(str(f))) for f in (tmp_path / "on/export", copy))
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(one.decode(latents), other.decode(latents))
    assert json.loads((copy / "config.json").read_text())["decoder_padding"] == "reflect"


@pytest.mark.parametrize("name", ["asymmetric", "qwen_image", "wan"])
def test_decoders_that_cannot_are_refused_in_one_line(name, tiny, tmp_path):
    public_family(name).save_pretrained(tmp_path / "before")
    given = tiny(model__pretrained=tmp_path / "before", model__decoder_padding="reflect")
    with pytest.raises(ConfigError, match=r"model.decoder_padding is reflect, but .*: set it to"):
        make_first_stage(given.model, 16)


def test_only_the_decoder_changes_and_latents_stay(tiny, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "before")
    train(tiny(model__pretrained=tmp_path / "before", model__decoder_padding="reflect",
               train__parts="[decoder]", train__max_steps=1, **OFF))  # fmt: skip
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before, after = (
        FirstStage(load_autoencoder(str(tmp_path / name))) for name in ("before", "run/export")
    )
    with torch.no_grad():
        assert torch.equal(before.encode(images).latents, after.encode(images).latents)
