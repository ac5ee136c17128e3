"""Codebooks and grids in the stock class: the same codes and images, scaled and folded."""

import copy

import pytest
import torch
from conftest import arguments
from diffusers import AutoencoderDC, AutoencoderTiny, VQModel

from first_stage.config import parse_config
from first_stage.errors import UserError
from first_stage.handover.card import load_snippet
from first_stage.handover.folding import common_deviation, fold_statistics
from first_stage.handover.reload import check_reload
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.loop import train
from first_stage.training.run_folder import EXPORT
from first_stage.training.step import Trainer

RULES = {
    "vq": {"model.family": "vq", "model.vq.codes": 512},
    "cosine": {"model.family": "vq", "model.vq.codes": 512, "model.vq.rule": "cosine"},
    "linear": {"model.family": "vq", "model.vq.codes": 2048},
    "fsq": {"model.family": "fsq", "model.fsq.levels": "[8,5,5,5]"},
}
STEPS = 60


def trained(folder, images, rule, monkeypatch, steps=STEPS):
    """The first stage as training left it, with its own quantizer, and its export in stock."""
    kept = {}
    original = Trainer.ema_weights

    def ema_weights(trainer):
        kept["trainer"] = trainer
        return original(trainer)

    monkeypatch.setattr(Trainer, "ema_weights", ema_weights)
    fields = {**RULES[rule], "train.max_steps": steps, "train.log_every": 20,
              "train.batch_size": 8}  # fmt: skip
    with torch.enable_grad():
        train(parse_config(arguments(folder / rule, images, **fields)))
    stock = VQModel.from_pretrained(folder / rule / EXPORT).eval()
    return kept["trainer"], stock


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_none_of_a_million_codes_differ(tmp_path, images, rule, monkeypatch):
    """Trained weights; our quantizer in the trainer against the stock class from the folder."""
    trainer, stock = trained(tmp_path, images, rule, monkeypatch)
    draw, count, differing = torch.Generator().manual_seed(0), 0, 0
    with trainer.ema_weights() as stage:
        # Convolutions round otherwise in the layout of training, which moves a latent in ten
        # thousand over the middle between two codes: the layout that diffusers loads.
        stage = copy.deepcopy(stage).to(memory_format=torch.contiguous_format)
        assert (stage.bottleneck.table().shape[0]) == stock.config.num_vq_embeddings
        for _ in range(16):
            coarse = torch.rand(1, 3, 64, 64, generator=draw) * 2 - 1
            x = torch.nn.functional.interpolate(coarse, (512, 512), mode="bicubic")
            latents = stage.encode(x).latents
            ours = stage.bottleneck.tokens(latents).flatten()
            theirs = stock.quantize(stock.encode(x).latents)[2][2].flatten()
            count, differing = count + len(ours), differing + int((ours != theirs).sum())
        x = x[..., :128, :128]
        rebuilt = stage.decode(stage.encode(x).latents)
        torch.testing.assert_close(stock(x).sample, rebuilt, rtol=0, atol=1e-5)
    assert count >= 1_000_000
    assert differing == 0


@torch.no_grad()
def test_an_export_that_differs_is_refused(tmp_path, images, monkeypatch):
    trainer, stock = trained(tmp_path, images, "linear", monkeypatch, steps=4)
    with trainer.ema_weights() as stage:
        check_reload(stage, tmp_path / "linear" / EXPORT)
        stock.quantize.embedding.weight.mul_(0.5)
        stock.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"of 128 codes differ and its decoder gives other"):
            check_reload(stage, tmp_path / "other")
    card = (tmp_path / "linear" / EXPORT / "README.md").read_text()
    for words in ("A `VQModel` trained on", "VQModel.from_pretrained", "2,048 codes of 4 dim",
                  "On the held-out images", "perplexity", "has no place"):  # fmt: skip
        assert words in " ".join(card.split()), words
    assert "shift_factor" not in card.split("## Recipe")[0]
    for line in ("vae.encode(images).latents * vae.config.scaling_factor", "vae.quantize("):
        assert line in card


@torch.no_grad()
def test_the_snippet_of_a_card_runs(tmp_path, images, monkeypatch):
    _, stock = trained(tmp_path, images, "fsq", monkeypatch, steps=2)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    code = load_snippet(FirstStage(stock), str(tmp_path / "fsq" / EXPORT))
    found = {"images": x, "h": 8, "w": 8}
    exec(code, found)
    assert found["tokens"].shape == (2, 8, 8)
    torch.testing.assert_close(found["latents"], stock.encode(x).latents * found["vae"].config
                               .scaling_factor)  # fmt: skip
    # The images were encoded and decoded twice: their codes are those of the first decoding.
    once = stock(x).sample
    torch.testing.assert_close(found["images"], stock(once).sample, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_shift_and_one_scale_fold_into_a_codebook(tmp_path, images, monkeypatch):
    _, stock = trained(tmp_path, images, "vq", monkeypatch, steps=4)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    mean, std = [0.3, -1.0, 0.0, 2.0], [0.5, 0.7, 0.9, 0.3]
    with pytest.raises(UserError, match="scaling them apart changes which code is nearest"):
        fold_statistics(stock, mean, std)
    common = common_deviation(std)
    assert common == pytest.approx([(1.64 / 4) ** 0.5] * 4)
    folded = fold_statistics(stock, mean, common)
    expected = (stock.encode(x).latents - torch.tensor(mean).view(1, 4, 1, 1)) / common[0]
    torch.testing.assert_close(folded.encode(x).latents, expected, rtol=1e-4, atol=1e-5)
    one, other = (m.quantize(m.encode(x).latents)[2][2] for m in (stock, folded))
    assert (one != other).float().mean() < 0.01  # halfway between two codes
    settled = FirstStage(stock).bottleneck.settle(stock.encode(x).latents)
    as_folded = (settled - torch.tensor(mean).view(1, 4, 1, 1)) / common[0]
    again = folded.decode(as_folded, force_not_quantize=True).sample
    direct = stock.decode(settled, force_not_quantize=True).sample
    torch.testing.assert_close(again, direct, rtol=0, atol=1e-4)
    assert folded.config.scaling_factor == 1.0
    folded.save_pretrained(tmp_path / "folded")
    assert FirstStage(load_autoencoder(str(tmp_path / "folded"))).latent_channels == 4


@pytest.mark.parametrize("model", [AutoencoderTiny, AutoencoderDC])
def test_what_has_no_convolutions_around_its_latents_is_refused(model):
    other = torch.nn.Module()
    other.__class__ = type(model.__name__, (torch.nn.Module,), {})
    with pytest.raises(UserError, match=f"this is a {model.__name__}, which has none"):
        fold_statistics(other, [0.0] * 4, [1.0] * 4)
