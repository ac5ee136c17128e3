"""Fine-tuning a first stage from a single file: what learns, and what stays."""

import pytest
import torch
from autoencoders import tiny_kl
from public_shapes import public_autoencoder
from safetensors.torch import save_file

from first_stage.errors import ConfigError
from first_stage.handover.single_file import ldm_weights
from first_stage.models.loading import load_autoencoder
from first_stage.training.loop import train
from latent_tools.format.manifest import fingerprint_weights

OFF = {"loss__learned__weight": 0, "loss__adversarial__weight": 0, "train__ema_decay": 0}
PARTS = {
    "decoder": ("decoder.", "post_quant_conv."),
    "last_block": ("decoder.up_blocks.1.", "decoder.conv_norm_out.", "decoder.conv_out."),
    "mid": ("decoder.mid_block.",),
    "conv_out": ("decoder.conv_out.",),
    "encoder": ("encoder.", "quant_conv."),
    "conv_in": ("encoder.conv_in.",),
}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_learns(part, tiny, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "before")
    train(tiny(model__pretrained=tmp_path / "before", train__parts=f"[{part}]", **OFF,
               train__max_steps=2))  # fmt: skip
    before, after = (
        load_autoencoder(str(tmp_path / name)).state_dict() for name in ("before", "run/export")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(PARTS[part]) for name in moved)
    # Gradients reach all of it, but for what a norm takes out again.
    assert {n for n in before if n.startswith(PARTS[part]) and n.endswith("weight")} <= moved


def test_decoder_only_from_a_whole_checkpoint_keeps_latents_and_scale(tiny, tmp_path):
    model = public_autoencoder("kl_f4")
    file = {f"first_stage_model.{key}": value for key, value in ldm_weights(model).items()}
    file["conditioner.embedders.1.x"] = torch.zeros(1)
    save_file(file, tmp_path / "whole.safetensors")
    train(tiny(model__pretrained=tmp_path / "whole.safetensors", train__parts="[decoder]", **OFF,
               train__max_steps=1))  # fmt: skip
    before = load_autoencoder(str(tmp_path / "whole.safetensors"))
    after = load_autoencoder(str(tmp_path / "run/export"))
    assert fingerprint_weights(before).encoder == fingerprint_weights(after).encoder
    assert fingerprint_weights(before).decoder != fingerprint_weights(after).decoder
    assert after.config.scaling_factor == 0.13025


def test_a_scale_that_the_user_gives_is_kept(tiny, tmp_path):
    save_file(ldm_weights(public_autoencoder("kl_f4")), tmp_path / "bare.safetensors")
    train(tiny(model__pretrained=tmp_path / "bare.safetensors", train__parts="[decoder]", **OFF,
               model__scaling_factor=0.5, train__max_steps=1))  # fmt: skip
    assert load_autoencoder(str(tmp_path / "run/export")).config.scaling_factor == 0.5


def test_an_inflated_run_goes_on_where_it_stopped(tiny, tmp_path):
    tiny_kl(in_channels=1).save_pretrained(tmp_path / "gray")
    fields = {"model__pretrained": tmp_path / "gray", "model__inflate_channels": True,
              "model__more_latent_channels": 2, **OFF}  # fmt: skip
    train(tiny(output_dir=tmp_path / "whole", **fields))
    train(tiny(output_dir=tmp_path / "parts", train__max_steps=2, **fields))
    train(tiny(output_dir=tmp_path / "parts", resume="latest", **fields))
    one, two = (load_autoencoder(str(tmp_path / name / "export")) for name in ("whole", "parts"))
    assert one.config.in_channels == 3
    assert one.config.latent_channels == 6
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train__parts": "[]"}, "train.parts is empty"),
        ({"train__parts": "[all, mid]"}, "name it alone"),
        ({"train__parts": "[mid]", "train__encoder_steps": 0}, "says already what learns"),
    ],
)
def test_parts_that_contradict_are_refused(fields, words, tiny):
    with pytest.raises(ConfigError, match=words):
        train(tiny(**fields))
