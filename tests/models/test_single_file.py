"""One file in: every bit in its place, the layout read off the shapes, anything else refused."""

import json
import logging
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from public_shapes import SHAPES, public_autoencoder
from safetensors.torch import save_file

from first_stage.errors import UserError
from first_stage.models import ldm_keys
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder


def ldm(model):
    rename = ldm_keys.tiny_to_ldm if "Tiny" in type(model).__name__ else ldm_keys.to_ldm
    return {key: value.contiguous() for key, value in rename(model.state_dict()).items()}


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_round_trip(model, folder):
    """In and out again: the class, its config and every bit."""
    save_file(ldm(model), folder / "stage.safetensors")
    loaded = load_autoencoder(str(folder / "stage.safetensors"))
    assert type(loaded) is type(model)
    assert same(loaded, model)
    open_ones = ("scaling_factor", "shift_factor", "sample_size", "force_upcast", "vq_embed_dim")
    for key, value in model.config.items():
        if not key.startswith("_") and key not in (*open_ones, "decoder_block_out_channels"):
            assert loaded.config[key] == value or list(loaded.config[key]) == list(value), key
    again = ldm(loaded)
    assert again.keys() == ldm(model).keys()
    assert not any(p.is_meta for p in loaded.parameters())
    return loaded


@pytest.mark.parametrize("name", SHAPES)
def test_a_single_file_comes_back_bit_by_bit(name, tmp_path):
    model = public_autoencoder(name)
    loaded = check_round_trip(model, tmp_path)
    stage, mine = FirstStage(loaded), FirstStage(model)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = stage.encode(images).latents
        assert torch.equal(latents, mine.encode(images).latents)
        assert torch.equal(stage.decode(latents), mine.decode(latents))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_true_public_shapes_come_back_bit_by_bit(name, tmp_path):
    """Random weights: the published ones cannot be had everywhere that tests run."""
    check_round_trip(public_autoencoder(name, small=False), tmp_path)


@pytest.mark.parametrize("name", ["sd", "flux", "kl_f4"])
def test_diffusers_reads_the_same_names(name, tmp_path):
    model = public_autoencoder(name)
    model.save_config(tmp_path / "folder")
    save_file(ldm(model), tmp_path / "stage.safetensors")
    stock = AutoencoderKL.from_single_file(
        str(tmp_path / "stage.safetensors"), config=str(tmp_path / "folder")
    )
    assert same(stock, model)


OTHERS = {
    "conditioner.embedders.1.model.ln_final.weight": 0.13025,
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": 0.18215,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_whole_checkpoint_gives_its_first_stage_and_says_its_scale(other, tmp_path, caplog):
    model = public_autoencoder("sd")
    file = {f"first_stage_model.{key}": value for key, value in ldm(model).items()}
    file |= {other: torch.zeros(4), "model.diffusion_model.out.0.weight": torch.zeros(4)}
    save_file(file, tmp_path / "whole.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_autoencoder(str(tmp_path / "whole.safetensors"))
    assert same(loaded, model)
    assert loaded.config.scaling_factor == OTHERS[other]
    assert f"scaling_factor {OTHERS[other]}" in caplog.text


def test_sd3_and_flux_are_told_apart_in_whole_checkpoints(tmp_path):
    model = public_autoencoder("flux")
    for other, scale in (("joint_blocks", (1.5305, 0.0609)), ("double_blocks", (0.3611, 0.1159))):
        file = {f"vae.{key}": value for key, value in ldm(model).items()}
        file[f"model.diffusion_model.{other}.0.attn.weight"] = torch.zeros(4)
        save_file(file, tmp_path / f"{other}.safetensors")
        loaded = load_autoencoder(str(tmp_path / f"{other}.safetensors"))
        assert FirstStage(loaded).scaling_and_shift == scale


def test_what_shapes_leave_open_is_said(tmp_path, caplog):
    save_file(ldm(public_autoencoder("sd")), tmp_path / "bare.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_autoencoder(str(tmp_path / "bare.safetensors"))
    assert "0.18215 in Stable Diffusion 1.x and 2.x, 0.13025 in Stable Diffusion XL" in caplog.text
    assert loaded.config.scaling_factor == 1.0


@pytest.mark.parametrize("suffix", ["ckpt", "pth"])
def test_a_pickle_of_tensors_is_read_with_what_training_left_in_it(suffix, tmp_path):
    model = public_autoencoder("kl_f4")
    file = {f"first_stage_model.{key}": value for key, value in ldm(model).items()}
    file |= {"model_ema.decay": torch.zeros(()), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": file, "global_step": 3}, tmp_path / f"stage.{suffix}")
    assert same(load_autoencoder(str(tmp_path / f"stage.{suffix}")), model)
    bare = {**ldm(model), "loss.logvar": torch.zeros(())}
    torch.save(bare, tmp_path / f"bare.{suffix}")
    assert same(load_autoencoder(str(tmp_path / f"bare.{suffix}")), model)


def test_half_weights_are_loaded_as_float32(tmp_path):
    model = public_autoencoder("sd").half()
    save_file(ldm(model), tmp_path / "half.safetensors")
    loaded = load_autoencoder(str(tmp_path / "half.safetensors"))
    assert loaded.dtype == torch.float32
    assert same(loaded, model.float())


def test_diffusers_names_in_a_single_file(tmp_path):
    model = public_autoencoder("sd")
    save_file(dict(model.state_dict()), tmp_path / "stage.safetensors")
    assert same(load_autoencoder(str(tmp_path / "stage.safetensors")), model)


class Code:
    """Runs when it is unpickled by something careless."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def wrong_files(folder):
    """A file of each kind, and the words that name it."""
    stage = ldm(public_autoencoder("kl_f4"))
    name = "text_model.encoder.layers.0.layer_norm1.weight"
    tensors = {
        "text.safetensors": ({name: torch.zeros(4)}, "a text encoder"),
        "t5.safetensors": (
            {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4)}, "a text encoder"),
        "lora.safetensors": ({"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, "a LoRA"),
        "unet.safetensors": (
            {"model.diffusion_model.out.0.weight": torch.zeros(4)}, "without its first stage"),
        "wan.safetensors": (
            {"encoder.downsamples.0.residual.0.gamma": torch.zeros(4)}, "a video autoencoder"),
        "other.safetensors": ({"x": torch.zeros(4)}, "a file of 1 other weights"),
        "half.safetensors": (
            {k: v for k, v in stage.items() if not k.startswith("decoder")}, "only a part"),
        "gap.safetensors": (
            {k: v for k, v in stage.items() if "mid.block_1.norm1" not in k}, "missing"),
        "shape.safetensors": (
            {**stage, "quant_conv.weight": torch.zeros(2, 2, 1, 1)}, "instead of"),
        "more.safetensors": ({**stage, "encoder.extra.weight": torch.zeros(2)}, "unknown"),
        "half2.safetensors": (
            {k: v for k, v in stage.items() if k.startswith("decoder")}, "only a part"),
        "vae_lora.safetensors": ({"vae.encoder.down.0.lora_A.weight": torch.zeros(4)}, "a LoRA"),
        "llava.safetensors": (
            {"model.language_model.layers.0.self_attn.q.weight": torch.zeros(4)}, "a text encoder"),
        "dit.safetensors": ({"blocks.0.self_attn.q.weight": torch.zeros(4)}, "a diffusion model"),
        "dc.safetensors": ({"encoder.project_in.conv.weight": torch.zeros(4)}, "a DC-AE"),
        "frames.safetensors": (
            {k: v[:, :, None] if v.ndim == 4 else v for k, v in stage.items()}, "a video auto"),
        "int8.safetensors": ({k: v.to(torch.int8) for k, v in stage.items()}, "is quantized: "),
        "two.safetensors": (
            {f"{p}.{k}": v.clone() for p in "ab" for k, v in stage.items()}, "under a., b.: save"),
    }  # fmt: skip
    found = {}
    for file, (weights, words) in tensors.items():
        save_file(weights, folder / file)
        found[file] = words
    save_file(stage, folder / "torn.safetensors")
    whole = (folder / "torn.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "torn2.safetensors").write_bytes(whole[:100])
    (folder / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    (folder / "picture.ckpt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (folder / "pointer.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (folder / "model_index.json").write_text("{}")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(folder / "program.pt"))
    torch.save({"ema": stage, "generator": stage}, folder / "several.pth")
    (folder / "page.safetensors").write_bytes(b"<!doctype html><html>not found</html>" * 9)
    torch.save(stage, folder / "named.pt")
    (folder / "named.safetensors").write_bytes((folder / "named.pt").read_bytes())
    torch.save({"state_dict": stage, "callback": Code()}, folder / "code.ckpt")
    (folder / "plain.ckpt").write_bytes(pickle.dumps(Code()))
    (folder / "torn.pth").write_bytes((folder / "named.pt").read_bytes()[:2000])
    return found | {
        "torn.safetensors": "is truncated: ", "torn2.safetensors": "is truncated: ",
        "page.safetensors": "a web page", "named.safetensors": "holds pickled objects",
        "code.ckpt": "holds code or objects", "plain.ckpt": "holds code or objects",
        "torn.pth": "is truncated", "a.gguf": "a GGUF file", "picture.ckpt": "neither tensors",
        "pointer.ckpt": "a pointer", "model_index.json": "name the folder",
        "program.pt": "a TorchScript program", "several.pth": "under ema., generator.: save",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_wrong_file_is_refused_in_one_line_that_says_what_it_is(tmp_path):
    for file, words in wrong_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_autoencoder(str(tmp_path / file), field="model.pretrained")
        assert words in str(caught.value), file
        assert str(caught.value).startswith(f"model.pretrained '{tmp_path / file}'"), file
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.", "model.first_stage_model.", "vae.vae.", "generator."])
def test_a_prefix_of_any_name_is_found(prefix, tmp_path):
    model = public_autoencoder("sd")
    weights = {prefix + key: value for key, value in ldm(model).items()}
    save_file(weights | {"loss.logvar": torch.zeros(())}, tmp_path / "x.safetensors")
    assert same(load_autoencoder(str(tmp_path / "x.safetensors")), model)
    nested = {"epoch": 3, "params": {prefix + key: value for key, value in ldm(model).items()}}
    torch.save(nested, tmp_path / "X.CKPT")
    assert same(load_autoencoder(str(tmp_path / "X.CKPT")), model)


def test_a_file_is_what_it_holds_whatever_its_name(tmp_path):
    model = public_autoencoder("tiny")
    save_file(ldm(model), tmp_path / "named.ckpt")
    assert same(load_autoencoder(str(tmp_path / "named.ckpt")), model)
    # A header as long as another kind of file begins: " <" and zeros.
    filler = {"filler": "x" * 20_000}
    header = (tmp_path / "named.ckpt").read_bytes()
    length = int.from_bytes(header[:8], "little")
    told = json.loads(header[8 : 8 + length]) | {"__metadata__": filler}
    text = json.dumps(told).encode()
    filler["filler"] = filler["filler"][: 20_000 - len(text) + 0x3C20]
    text = json.dumps(told | {"__metadata__": filler}).encode()
    assert len(text) == 0x3C20
    whole = len(text).to_bytes(8, "little") + text + header[8 + length :]
    assert whole.startswith(b" <")
    (tmp_path / "odd.safetensors").write_bytes(whole)
    assert same(load_autoencoder(str(tmp_path / "odd.safetensors")), model)


def test_variants_shards_and_a_folder_of_files(tmp_path):
    model = public_autoencoder("kl_f4")
    model.save_pretrained(tmp_path / "half", variant="fp16")
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    model.save_pretrained(tmp_path / "pipe/vae", max_shard_size="2MB", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "other", variant="non_ema")
    shard = "shards/diffusion_pytorch_model-00001-of-"
    (first,) = (str(f.relative_to(tmp_path)) for f in tmp_path.glob(f"{shard}*"))
    for name in ("half", "shards", "pipe", "other", first):
        assert same(load_autoencoder(str(tmp_path / name)), model), name
    (tmp_path / "files").mkdir()
    save_file(ldm(model), tmp_path / "files/my.safetensors")
    with pytest.raises(UserError, match=r"name the file itself \(my.safetensors\)"):
        load_autoencoder(str(tmp_path / "files"))
