"""One file out: what programs read, and a checkpoint in which nothing else changes."""

import pytest
import torch
from autoencoders import tiny_dc, tiny_kl
from public_shapes import SHAPES, public_autoencoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from first_stage.commands.export import main
from first_stage.errors import UserError
from first_stage.handover.single_file import ldm_weights, programs
from first_stage.models.loading import load_autoencoder


def export(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder of a first stage, by the name of its shapes."""

    def save(name):
        public_autoencoder(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", SHAPES)
def test_out_in_and_out_again_is_the_same_file(name, folder, tmp_path, capsys):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    export("--first_stage", folder(name), "--layout", "ldm", "--output", one)
    export("--first_stage", one, "--layout", "ldm", "--output", other)
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata() == second.metadata()
        assert first.keys() == second.keys()
        for key in first.keys():  # noqa: SIM118  # it is no mapping
            assert torch.equal(first.get_tensor(key), second.get_tensor(key))
    assert "read by" in capsys.readouterr().out
    assert "is read by: " in one.with_suffix(".md").read_text()
    export("--first_stage", other, "--output", tmp_path / "back")
    weights = load_autoencoder(str(folder(name))).state_dict()
    back = load_autoencoder(str(tmp_path / "back"))
    assert all(torch.equal(back.state_dict()[key], value) for key, value in weights.items())


def test_groups_and_scale_travel_in_the_header(tmp_path):
    """Widths that 32 groups do not divide, of which shapes say nothing."""
    vae = tiny_kl(attention=True)
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    vae.save_pretrained(tmp_path / "folder")
    file = tmp_path / "one.safetensors"
    export("--first_stage", tmp_path / "folder", "--layout", "ldm", "--output", file)
    config = load_autoencoder(str(file)).config
    assert (config.norm_num_groups, config.scaling_factor, config.shift_factor) == (4, 0.7, 0.1)
    save_file(load_file(file), file)  # without the header
    with pytest.raises(UserError, match=r"which 32 groups.*do not divide"):
        load_autoencoder(str(file))


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_into_replaces_the_first_stage_and_no_other_byte(prefix, folder, tmp_path, capsys):
    old = {prefix + key: torch.full_like(value, 0.5).half() for key, value in
           ldm_weights(public_autoencoder("sd")).items()}  # fmt: skip
    others = {
        "model.diffusion_model.out.0.weight": torch.randn(40),
        "cond_stage_model.x": torch.randn(3, 5).bfloat16(),
        "first_stage_model_ema": torch.arange(5),
    }
    save_file(old | others, tmp_path / "old.safetensors", metadata={"modelspec.title": "mine"})
    export("--first_stage", folder("sd"), "--into", tmp_path / "old.safetensors",
           "--output", tmp_path / "new.safetensors")  # fmt: skip
    assert f"{len(old)} tensors replaced (F16)" in capsys.readouterr().out
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    expected = public_autoencoder("sd").half().state_dict()
    for key, value in others.items():
        assert torch.equal(after[key], value)
    for key, value in load_autoencoder(str(tmp_path / "new.safetensors")).state_dict().items():
        assert torch.equal(value, expected[key].float())
    # Every byte outside of the replaced tensors, header included.
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("old", "new"))
    assert len(one) == len(two)
    changed = sum(a != b for a, b in zip(one, two, strict=True))
    assert 0 < changed <= sum(v.numel() * 2 for v in old.values())
    assert before.keys() == after.keys()
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.title": "mine"}


def test_into_refuses_what_does_not_fit(folder, tmp_path):
    other = {f"first_stage_model.{key}": value for key, value in
             ldm_weights(public_autoencoder("flux")).items()}  # fmt: skip
    save_file(other, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    torch.save(other, tmp_path / "other.ckpt")
    for name, words in [
        ("other.safetensors", "has another first stage"),
        ("none.safetensors", "not a first stage"),
        ("other.ckpt", "no .safetensors"),
        ("nowhere.safetensors", "does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            export("--first_stage", folder("sd"), "--into", tmp_path / name,
                   "--output", tmp_path / "new.safetensors")  # fmt: skip
        assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precision_says_what_it_changes(half, folder, tmp_path, capsys):
    file = tmp_path / "half.safetensors"
    export("--first_stage", folder("sd"), "--layout", "ldm", "--half", half, "--output", file)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    assert {value.dtype for value in load_file(file).values()} == {dtype}
    told = capsys.readouterr().out.split("decode to images ")[1]
    assert 20 < float(told.split(" dB")[0]) < 120
    huge = load_autoencoder(str(tmp_path / "sd"))
    with torch.no_grad():
        huge.quant_conv.weight.fill_(1e6)
    huge.save_pretrained(tmp_path / "huge")
    arguments = ("--first_stage", tmp_path / "huge", "--half", half, "--output", tmp_path / "out")
    if half == "bf16":
        export(*arguments)
    else:
        with pytest.raises(UserError, match="does not fit into it"):
            export(*arguments)


def test_a_scale_that_the_user_gives_is_written(folder, tmp_path):
    export("--first_stage", folder("sd"), "--scaling_factor", "0.13025",
           "--output", tmp_path / "xl")  # fmt: skip
    assert load_autoencoder(str(tmp_path / "xl")).config.scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("out", []),
        ("out", ["--fold_statistics", "--data.path", "photos"]),
        ("out.safetensors", ["--layout", "ldm"]),
        ("out.safetensors", ["--into", "model.safetensors"]),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    name, more, folder, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    for work in ("standard", "put_into", "write_single_file"):  # calling it would be another error
        monkeypatch.setattr(f"first_stage.commands.export.{work}", None)
    with pytest.raises(UserError, match=f"--output .*{name}' cannot be written: Not a directory"):
        export("--first_stage", folder("sd"), "--output", tmp_path / "file" / name, *more)


def test_which_programs_take_a_layout():
    sd = public_autoencoder("sd", small=False)
    assert programs(sd) == "ComfyUI, A1111, Forge, kohya's --vae"
    sd.register_to_config(latent_channels=16, use_quant_conv=False)
    assert programs(sd).startswith("ComfyUI; not A1111")
    assert "widths [8, 16]" in programs(tiny_kl())
    with pytest.raises(UserError, match="AutoencoderDC has no layout"):
        ldm_weights(tiny_dc())
