"""More public classes: as diffusers computes them, trained, handed over and cached."""

import json
import re

import diffusers
import pytest
import torch
from conftest import arguments, picture
from equality import RECORDING, check_equal, line
from launching import run
from public_families import FAMILIES, WHOLE, public_family, whole_family
from public_shapes import public_autoencoder
from recording import record

from first_stage.commands import cache, evaluate, export
from first_stage.config import parse_config
from first_stage.errors import ConfigError
from first_stage.files import sha256
from first_stage.models.families import FAMILIES as REGISTERED
from first_stage.models.families import family_named
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.loop import train
from latent_tools import LatentDataset
from latent_tools.format.manifest import fingerprint_weights

FRAMES = ("qwen_image", "wan", "wan_22")
OFF = {"loss.learned.weight": 0, "loss.adversarial.weight": 0, "train.ema_decay": 0}


def pixels(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def stock(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' own `encode` and `decode` give: moments, and images of the means."""
    frames = isinstance(model, diffusers.AutoencoderKLQwenImage | diffusers.AutoencoderKLWan)
    moments = model.encode(images[:, :, None] if frames else images).latent_dist.parameters
    mean = moments.chunk(2, 1)[0]
    decoded = model.decode(mean).sample
    return (moments[:, :, 0], decoded[:, :, 0]) if frames else (moments, decoded)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_diffusers_computes_and_a_folder_gives_it_back(name, tmp_path):
    model = public_family(name)
    if name in FRAMES:
        model.decoder.conv_out.weight.mul_(9)  # so that the clamp has something to do
    stage = FirstStage(model)
    moments, decoded = stock(model, pixels())
    code = stage.family.to_code(stage.model, pixels())
    assert torch.equal(code, moments)
    ours = stage.decode(stage.encode(pixels()).latents)
    assert ours.abs().max() > 1
    assert torch.equal(ours.clamp(-1, 1) if name in FRAMES else ours, decoded)
    side = 32 // stage.downsample_factor
    assert tuple(code.shape) == (2, 2 * stage.latent_channels, side, side)
    for step in range(2):  # out, in, and out again
        model.save_pretrained(tmp_path / str(step))
        model = load_autoencoder(str(tmp_path / str(step)))
    files = [(tmp_path / k / "diffusion_pytorch_model.safetensors").read_bytes() for k in "01"]
    assert files[0] == files[1]


def tried_at_true_shape(name, folder):
    """Out, in and out again; what was written both times, and the class that came back."""
    model, sums = whole_family(name), []
    for value in model.buffers():
        if value.is_floating_point():
            value.normal_().abs_()  # a batch norm's, else 0 and 1
    config = dict(model.config)
    for _ in range(2):
        kind = type(model)
        model.save_pretrained(folder)
        del model
        files = sorted(folder.glob("*.safetensors"))
        sums.append([sha256(file) for file in files])
        model = load_autoencoder(str(folder))
        assert type(model) is kind
    assert sums[0] == sums[1]
    told = {key: value for key, value in model.config.items() if not key.startswith("_")}
    wanted = {key: value for key, value in config.items() if not key.startswith("_")}
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asymmetric_1.5", "qwen_image", "wan_2.1", "dc_f32c32_sana"])
def test_the_true_public_shapes_come_back_bit_by_bit(name, tmp_path):
    """Random weights; the largest ones of `WHOLE` take gigabytes."""
    tried_at_true_shape(name, tmp_path)


@pytest.mark.parametrize("name", WHOLE)
def test_factor_channels_and_layout_of_the_true_public_shapes(name):
    stage = FirstStage(whole_family(name, "meta"))
    assert (stage.downsample_factor, stage.latent_channels) == WHOLE[name][2]
    assert stage.in_channels == 3
    layout = stage.family.layout(stage.model)
    assert (layout["in_channels"], layout["latent_channels"]) == (3, WHOLE[name][2][1])
    frozen = {id(p) for part in stage.family.encoder_parts(stage.model) for p in part.parameters()}
    names = {n for n, p in stage.model.named_parameters() if id(p) in frozen}
    assert {n.split(".")[0] for n in names} <= {"encoder", "quant_conv"}
    assert stage.last_layer.shape[0] in (3, 12)  # Wan 2.2 puts out patches of 2x2


@pytest.mark.parametrize("name", FRAMES)
def test_gradients_do_not_stop_at_the_clamp(name):
    stage = FirstStage(public_family(name))
    latents = stage.encode(pixels()).latents.detach() * 50
    with torch.no_grad():
        stage.model.decoder.conv_out.weight.mul_(50)
    latents.requires_grad_()
    decoded = stage.decode(latents)
    beyond = decoded.detach().abs() > 1
    assert beyond.any()
    (gradient,) = torch.autograd.grad(decoded[beyond].sum(), latents)
    assert gradient.abs().sum() > 0
    clamped = stage.model.decode(latents[:, :, None]).sample[:, :, 0]
    (stopped,) = torch.autograd.grad(clamped[beyond].sum(), latents)
    assert not stopped.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_is_trained_and_everything_else_stays(name, tmp_path, images):
    public_family(name).save_pretrained(tmp_path / "before")
    fields = {**OFF, "model.pretrained": tmp_path / "before", "train.parts": "[decoder]",
              "train.max_steps": 2}  # fmt: skip
    assert train(parse_config(arguments(tmp_path / "run", images, **fields))).finished
    before, after = (load_autoencoder(str(tmp_path / n)) for n in ("before", "run/export"))
    assert fingerprint_weights(before).encoder == fingerprint_weights(after).encoder
    moved = {n for n, v in before.state_dict().items() if not torch.equal(v, after.state_dict()[n])}
    idle = [p for part in FirstStage(after).family.idle_parts(after) for p in part.parameters()]
    assert len(idle) > 0 or name == "hunyuan_image"
    still = {id(p) for p in idle}
    decoder = {n for n, p in after.named_parameters()
               if n.startswith(("decoder.", "post_quant_conv."))
               and id(p) not in still}  # fmt: skip
    assert moved <= decoder
    assert {n for n in decoder if n.endswith("weight")} <= moved
    known = ("scaling_factor", "latents_mean", "latents_std")
    assert all(before.config.get(k) == after.config.get(k) for k in known)
    card = (tmp_path / "run/export/README.md").read_text()
    if name in FRAMES:
        assert "so is what `latents_mean` and `latents_std` of its config say" in " ".join(
            card.split()
        )


@pytest.mark.parametrize("name", ["wan_22", "flux2"])
def test_statistics_of_each_channel_are_measured_anew_when_the_encoder_learns(
    name, tmp_path, images
):
    """And the card's own lines turn latents into what its pipelines expect, and back."""
    model = public_autoencoder("flux2") if name == "flux2" else public_family(name)
    model.save_pretrained(tmp_path / "before")
    fields = {**OFF, "model.pretrained": tmp_path / "before", "train.max_steps": 1}
    train(parse_config(arguments(tmp_path / "run", images, **fields)))
    export = tmp_path / "run/export"
    found = json.loads((export / "latent_statistics.json").read_text())
    vae = load_autoencoder(str(export))
    if name == "flux2":
        eps = vae.config.batch_norm_eps
        mean, std = vae.bn.running_mean.view(-1, 4), (vae.bn.running_var + eps).sqrt().view(-1, 4)
        assert torch.equal(mean, mean[:, :1].expand(-1, 4))
        mean, std = mean[:, 0].tolist(), std[:, 0].tolist()
        assert vae.config.get("latents_mean") is None
    else:
        mean, std = vae.config.latents_mean, vae.config.latents_std
    assert mean == pytest.approx(found["mean"], rel=1e-5)
    assert std == pytest.approx(found["std"], rel=1e-5)
    card = (export / "README.md").read_text()
    assert "training images, are in" in " ".join(card.split())
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    shown = {"torch": torch, "images": pixels()}
    torch.manual_seed(0)
    with torch.no_grad():
        exec(code.replace('"this-folder"', repr(str(export))), shown)
    latents = shown["latents"]
    assert latents.shape[1] == len(mean) * (4 if name == "flux2" else 1)
    assert shown["images"].shape == pixels().shape
    if name == "flux2":
        raw = diffusers.Flux2Pipeline._unpatchify_latents(
            latents * (vae.bn.running_var.view(1, -1, 1, 1) + eps).sqrt()
            + vae.bn.running_mean.view(1, -1, 1, 1)
        )
        torch.testing.assert_close(vae.decode(raw).sample, shown["images"], rtol=0, atol=1e-5)


def test_a_decoder_of_flux2_keeps_its_buffers(tmp_path, images):
    public_autoencoder("flux2").save_pretrained(tmp_path / "before")
    fields = {**OFF, "model.pretrained": tmp_path / "before", "train.max_steps": 1,
              "train.parts": "[last_block]"}  # fmt: skip
    train(parse_config(arguments(tmp_path / "run", images, **fields)))
    before, after = (load_autoencoder(str(tmp_path / n)) for n in ("before", "run/export"))
    assert torch.equal(before.bn.running_mean, after.bn.running_mean)
    assert torch.equal(before.bn.running_var, after.bn.running_var)


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_image"])
def test_it_is_measured_and_cached(name, tmp_path, images):
    folder = str(tmp_path / "model")
    public_family(name).save_pretrained(folder)
    data = ["--data.path", str(images), "--data.resolution", "16"]
    evaluate.main(["--first_stage", folder, *data, "--output", str(tmp_path / "found")])
    cache.main(["--first_stage", folder, *data, "--output", str(tmp_path / "cache")])
    cached = LatentDataset(tmp_path / "cache", expect=load_autoencoder(folder), normalize="none")
    assert cached[0]["latents"].ndim == 3
    assert torch.isfinite(cached[0]["latents"]).all()


def test_two_processes_train_one_frame_as_one_does(tmp_path):
    """What joins frames has no gradient, for which a wrapper would wait."""
    (tmp_path / "images").mkdir()
    for index in range(17):
        picture(index).save(tmp_path / "images" / f"{index:02d}.png")
    public_family("wan").save_pretrained(tmp_path / "before")
    fields = {"model.pretrained": tmp_path / "before", "train.learning_rate": 1e-4}
    record(parse_config(line(tmp_path, "one", 2, **fields)), tmp_path / "record-one")
    run(
        *(2, RECORDING, tmp_path / "record-many", tmp_path / "one"),
        *line(tmp_path, "many", 3, **fields),
        output=tmp_path / "many.txt",
    )
    check_equal(tmp_path, "many", 2)


@pytest.mark.parametrize("name", ["hunyuan_image", "asymmetric", "qwen_image", "wan", "flux2"])
def test_none_is_built_anew_and_none_is_checkpointed_in_silence(name, tmp_path, images):
    with pytest.raises(ConfigError, match=f"model.family is {name}, which is trained from a"):
        family_named(name).build(parse_config(arguments("x", images)).model, 16)
    if name != "flux2":
        public_family(name).save_pretrained(tmp_path / "before")
        fields = {"model.pretrained": tmp_path / "before", "model.gradient_checkpointing": "true"}
        with pytest.raises(ConfigError, match="no gradient checkpointing"):
            train(parse_config(arguments(tmp_path / "run", images, **fields)))


@pytest.mark.parametrize("name", ["wan", "flux2"])
def test_the_export_says_where_each_channel_has_its_own(name, tmp_path, capsys):
    model = public_autoencoder(name) if name == "flux2" else public_family(name)
    model.save_pretrained(tmp_path / "before")
    line = ["--first_stage", str(tmp_path / "before"), "--output", str(tmp_path / "after")]
    with pytest.raises(ConfigError, match=r"scaling_factor is 0.5, but .* keeps what each channel"):
        export.main([*line, "--scaling_factor", "0.5"])
    export.main(line)
    said = "the running mean and variance of its batch norm" if name == "flux2" else "latents_mean"
    told, card = capsys.readouterr().out, (tmp_path / "after/README.md").read_text()
    for text in (told, card):
        assert "mean and deviation of each channel in" in text
        assert said in text
        assert "scaling_factor" not in text
    before, after = (load_autoencoder(str(tmp_path / n)) for n in ("before", "after"))
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert before.config.get("latents_std") == after.config.get("latents_std")


def test_every_class_says_what_its_card_says():
    """A card's lines are Python, whatever the carrier."""
    for family in REGISTERED.values():
        compile("\n".join(family.carrier.usage("vae.encode(images)")), family.name, "exec")
