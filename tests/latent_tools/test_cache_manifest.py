import re

import pytest
import torch
from cache_helpers import make_vae

from first_stage.models.first_stage import as_first_stage
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import (
    Manifest,
    describe_first_stage,
    fingerprint_weights,
    latent_config,
    mismatches,
)


def manifest(vae, **changes):
    return Manifest(
        first_stage=describe_first_stage(as_first_stage(vae, "x"), None),
        preprocessing={
            "resolution": changes.get("resolution", 16),
            "color": "srgb",
            "upright": True,
        },
        store={"dtype": changes.get("dtype", "float16"), "representation": "moments"},
        source={},
        made_with={},
        command="",
    )


def change(vae, name):
    with torch.no_grad():
        dict(vae.named_parameters())[name].flatten()[0] += 1e-3
    return vae


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quant_conv.bias"])
def test_an_encoder_weight_is_a_mismatch_that_is_named(name):
    before, after = manifest(make_vae()), manifest(change(make_vae(), name))
    (phrase,) = mismatches(before, after)
    assert name in phrase
    assert before.first_stage["encoder_sha256"][:16] in phrase
    assert after.first_stage["encoder_sha256"][:16] in phrase
    assert "1 of " in phrase


@pytest.mark.parametrize("place", [0, 2**19, -1])
def test_every_element_of_a_large_weight_counts(place):
    weights = torch.nn.Linear(1024, 1024, bias=False)
    before = fingerprint_weights(weights)
    with torch.no_grad():
        weights.weight.view(-1)[place] += 1e-3
    assert fingerprint_weights(weights).encoder != before.encoder


@pytest.mark.parametrize("name", ["decoder.conv_out.weight", "post_quant_conv.bias"])
def test_a_decoder_weight_is_no_mismatch(name):
    before, after = manifest(make_vae()), manifest(change(make_vae(), name))
    assert mismatches(before, after) == []
    assert before.first_stage["decoder_sha256"] != after.first_stage["decoder_sha256"]


def test_preprocessing_and_store_show_both_sides():
    found = mismatches(manifest(make_vae()), manifest(make_vae(), resolution=32, dtype="float32"))
    assert found == [
        "preprocessing.resolution: cache 16, now 32",
        "store.dtype: cache 'float16', now 'float32'",
    ]


def test_config_entries_that_change_latents_count_and_others_do_not():
    vae = make_vae()
    before = manifest(vae)
    vae.register_to_config(scaling_factor=9.0, shift_factor=1.0, force_upcast=True, sample_size=8)
    assert mismatches(before, manifest(vae)) == []
    vae.register_to_config(norm_num_groups=2)
    assert mismatches(before, manifest(vae)) == [
        "first_stage config.norm_num_groups: cache 4, now 2"
    ]


def test_latent_config_keeps_the_encoder_layout():
    kept = latent_config(make_vae().config)
    assert {"block_out_channels", "down_block_types", "latent_channels", "act_fn"} <= set(kept)
    assert not {key for key in kept if re.match("_|up_|scal|shift|force", key)}


def test_fingerprint_depends_on_names_shapes_and_types():
    vae = make_vae()
    assert fingerprint_weights(vae) == fingerprint_weights(make_vae())
    assert fingerprint_weights(vae).encoder != fingerprint_weights(make_vae(1)).encoder
    assert fingerprint_weights(vae.half()).encoder != fingerprint_weights(make_vae()).encoder


def test_manifest_reads_back_and_names_what_is_wrong(tmp_path):
    made = manifest(make_vae())
    made.save(tmp_path)
    assert Manifest.load(tmp_path) == made
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "first-stage latent cache", "version": 9}')
    with pytest.raises(CacheError, match="version 9"):
        Manifest.load(tmp_path)
