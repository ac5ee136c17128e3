"""Before and after: gains, drift, flat colors and seams, each against what it must be."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoencoders import pictures_in, tiny_dc, tiny_kl, tiny_taesd, tiny_vq
from diffusers import AutoencoderTiny
from torch import nn

from first_stage.commands.evaluate import main
from first_stage.data import FixedImages, open_source
from first_stage.errors import UserError
from first_stage.evaluation import EvaluationImages, HeldImages, Options, evaluate_change, load
from first_stage.evaluation.change import WORST, change_in_words, change_of
from first_stage.evaluation.drift import drift_in_words
from first_stage.evaluation.flat import flat_colors, flat_in_words, flat_test
from first_stage.evaluation.pictures import choose_by_gain
from first_stage.evaluation.seams import seam_test, tiles_of
from first_stage.metrics import images as metrics
from first_stage.models.first_stage import FirstStage, as_first_stage, reconstruct


def held(count: int, side: int = 16, channels: int = 3) -> HeldImages:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return HeldImages(FixedImages(torch.from_numpy(pixels), [f"{k}" for k in range(count)]), "held")


def with_other_decoder(model: nn.Module) -> nn.Module:
    """A copy whose decoder has other weights."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.decoder.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
    return other


class Patterned(nn.Module):
    """An f4 autoencoder that loses nothing, and adds a pattern of its own."""

    def __init__(self, pattern):
        super().__init__()
        self.config = SimpleNamespace(in_channels=3)
        self.weight = nn.Parameter(torch.zeros(()))
        self.pattern = pattern

    def encode(self, x):
        return SimpleNamespace(latents=nn.functional.pixel_unshuffle(x, 4))

    def decode(self, z):
        images = nn.functional.pixel_shuffle(z, 4)
        return SimpleNamespace(sample=images + self.pattern(*images.shape[-2:]))


EVERY = {
    "kl 1": lambda: tiny_kl(1),
    "kl 3": lambda: tiny_kl(3),
    "kl 4": lambda: tiny_kl(4),
    "kl 5": lambda: tiny_kl(5),
    "vq": tiny_vq,
    "tiny": tiny_taesd,
    "dc": tiny_dc,
}


@pytest.mark.parametrize("name", EVERY)
def test_another_decoder_leaves_latents_as_they_are(name) -> None:
    before = EVERY[name]()
    after = with_other_decoder(before)
    images = held(4, side=20, channels=as_first_stage(before).in_channels)
    found = evaluate_change(("old", before), ("new", after), images, Options(tiled=1))
    drift = found.change["latents"]
    assert drift["exact"]
    assert drift["largest"] == drift["relative"] == 0.0
    assert set(drift["channels"]) == {0.0}
    assert drift["tokens_changed"] == (0.0 if name == "vq" else None)
    assert drift_in_words(drift).startswith("Latents are the same bit for bit")
    assert any(row["psnr"] != 0 for row in found.change["per_image"])
    for stage in found.first_stages:
        assert stage["flat"]["off_mean"] > 0
        assert (stage["seams"]["note"] != "") == (name in ("vq", "tiny"))


def test_a_gain_is_the_difference_of_the_metric_in_the_better_direction() -> None:
    before = tiny_kl()
    after = with_other_decoder(before)
    images = held(5)
    found = evaluate_change(("old", before), ("new", after), images, Options())
    originals = torch.from_numpy(images.images.pixels.numpy()).permute(0, 3, 1, 2) / 127.5 - 1
    values = {}
    for name, model in (("old", before), ("new", after)):
        rebuilt = metrics.eight_bit(reconstruct(FirstStage(model), originals)[0])
        exact = metrics.eight_bit(originals)
        values[name] = {m: getattr(metrics, m)(exact, rebuilt) for m in ("psnr", "ssim", "l1")}
    for metric, sign in (("psnr", 1), ("ssim", 1), ("l1", -1)):
        gains = (sign * (values["new"][metric] - values["old"][metric])).tolist()
        assert [row[metric] for row in found.change["per_image"]] == pytest.approx(gains, abs=1e-2)
        summary = found.change["gains"][metric]
        assert summary["mean"] == pytest.approx(np.mean(gains), abs=1e-2)
        assert summary["improved"] == np.mean([gain > 0 for gain in gains])
    gains = (values["new"]["psnr"] - values["old"]["psnr"]).numpy()
    assert found.change["worst"] == np.argsort(gains).tolist()
    half = 1.96 * gains.std(ddof=1) / math.sqrt(5)
    assert found.change["gains"]["psnr"]["half_interval"] == pytest.approx(half, abs=1e-2)


def test_exact_images_have_a_rank_and_no_number() -> None:
    def entry(name, errors):
        rows = [
            {"index": k, "id": str(k), "mse": e, "identical": e == 0, "l1": e,
             "psnr": None if e == 0 else -10 * math.log10(e)}
            for k, e in enumerate(errors)
        ]  # fmt: skip
        return {"name": name, "per_image": rows, "drift": {}}

    change = change_of(entry("a", [0.1, 0.1, 0.0, 0.0]), entry("b", [0.0, 0.01, 0.1, 0.0]))
    assert change["worst"] == [2, 3, 1, 0]  # became inexact, stayed exact, gained, became exact
    assert [row["psnr"] for row in change["per_image"]] == [None, pytest.approx(10), None, 0.0]
    assert change["gains"]["psnr"]["images"] == 2
    (sentence,) = change_in_words(change)
    assert sentence.startswith("+5.00 dB PSNR on average over 2 images")


def test_an_encoder_that_moved_is_measured_and_said() -> None:
    before = tiny_kl()
    after = copy.deepcopy(before)
    with torch.no_grad():  # the means of channel 0 move by two
        after.quant_conv.bias[0] += 2.0
    images = held(3)
    drift = evaluate_change(("old", before), ("new", after), images).change["latents"]
    latents = before.encode(torch.from_numpy(images.images.pixels.numpy()).permute(0, 3, 1, 2)
                            / 127.5 - 1).latent_dist.mean  # fmt: skip
    expected = 2.0 / latents.transpose(0, 1).flatten(1).std(1, correction=0)[0].item()
    assert not drift["exact"]
    assert drift["channels"] == [pytest.approx(expected, rel=1e-4), 0.0, 0.0, 0.0]
    assert drift["largest"] == pytest.approx(2.0, rel=1e-5)
    assert drift_in_words(drift).startswith("Latents moved by")
    # A posterior that only got wider has the same means, and other latents all the same.
    wider = copy.deepcopy(before)
    with torch.no_grad():
        wider.quant_conv.bias[4] += 0.5
    drift = evaluate_change(("old", before), ("new", wider), images).change["latents"]
    assert not drift["exact"]
    assert drift["relative"] == 0.0


def test_unlike_first_stages_are_refused_in_one_line() -> None:
    for other, words in (
        (tiny_kl(1), "images of 3 channels, but 'new' images of 1 channels"),
        (tiny_kl(latent_channels=8), "latents of 4 channels at 1/2 .* latents of 8 channels"),
        (
            tiny_kl(levels=3),
            "4 channels at 1/2 of the size, but 'new' latents of 4 channels at 1/4",
        ),
    ):
        with pytest.raises(UserError, match=f"'old' has .*{words}") as refused:
            evaluate_change(("old", tiny_kl()), ("new", other), held(2))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_flat_colors_are_of_one_value_a_channel(channels) -> None:
    colors = flat_colors(channels)
    assert colors.shape[1] == channels
    assert len({tuple(c) for c in colors.tolist()}) == len(colors)
    assert colors.abs().max() == 1
    assert len(colors) == {1: 5, 3: 8, 4: 9, 5: 10}[channels]


def test_flat_colors_through_an_exact_first_stage_stay_flat() -> None:
    figures, _ = flat_test(FirstStage(Patterned(lambda h, w: torch.zeros(h, w))))
    assert figures["off_mean"] == figures["ripple"] == figures["shift"] == 0.0
    assert figures["repeats"] is None


def test_a_checkerboard_repeats_with_every_latent_and_a_spot_does_not() -> None:
    size = 4 / 127.5  # four levels

    def checkerboard(height, width):
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        return size * ((-1.0) ** (rows + columns))

    def spot(height, width):
        result = torch.zeros(height, width)
        result[height // 2, width // 2] = 0.5
        return result

    board, _ = flat_test(FirstStage(Patterned(checkerboard)))
    # Black and white are clamped, and show half of it.
    assert board["colors"][2]["ripple"] == pytest.approx(4, rel=1e-4)
    assert board["colors"][0]["ripple"] == pytest.approx(2, rel=1e-4)
    assert board["repeats"] == pytest.approx(1, rel=1e-5)
    assert "100% repeats with every latent" in flat_in_words(board)
    dots, _ = flat_test(FirstStage(Patterned(spot)))
    assert dots["colors"][2]["ripple"] == pytest.approx(0.5 * 127.5 / dots["side"], rel=1e-3)
    assert dots["repeats"] < 0.05
    # What lies at the border alone is not inside.
    frame, _ = flat_test(FirstStage(Patterned(lambda h, w: size * (torch.arange(w) < 4).float())))
    assert frame["ripple"] > 0.5
    assert frame["ripple_inside"] == 0.0


@pytest.mark.parametrize("make", [tiny_kl, tiny_dc])
def test_seams_lie_where_diffusers_blends(make) -> None:
    """A decoder that paints each tile in its own color shows where tiles end."""
    model = make()
    if make is tiny_dc:
        model.enable_tiling(32, 32, 24, 24)
        model.use_tiling = False
    else:
        model.tile_sample_min_size, model.tile_latent_min_size = 32, 16
    stage = FirstStage(model)

    class Paints(nn.Module):
        def forward(self, z):
            mean = z.mean((1, 2, 3), keepdim=True)
            return mean.expand(-1, 3, 2 * z.shape[-2], 2 * z.shape[-1]).clone()

    model.decoder = Paints()
    tiles = tiles_of(model)
    assert tiles is not None
    assert (tiles.size, tiles.stride, tiles.image_side) == (32, 24, 44)
    side = 88
    latents = torch.randn(1, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(0))
    model.enable_tiling()
    painted = stage.decode(latents)[0, 0]
    changes = (painted.diff(dim=1).abs() > 1e-6).any(0)  # between a column and the next
    near = tiles.near(side, 1)
    assert changes.any()
    assert not changes[~near[1:]].any()


def test_seams_of_a_decoder_that_sees_no_borders_are_none() -> None:
    model = tiny_kl()
    model.tile_sample_min_size, model.tile_latent_min_size = 32, 16

    class Enlarges(nn.Module):
        def forward(self, z):
            return nn.functional.interpolate(z[:, :3], scale_factor=2)

    real = seam_test(FirstStage(model), held(3, side=50), 2)[0]
    assert real["images"] == 2
    assert real["note"] == ""
    assert real["elsewhere"] > 0
    assert real["near"] > 0
    assert model.use_tiling is False
    model.decoder, model.post_quant_conv = Enlarges(), nn.Identity()
    figures, _ = seam_test(FirstStage(model), held(3, side=50), 2)
    # Blending equal pixels rounds.
    assert figures["near"] < 1e-4
    assert figures["elsewhere"] == 0.0


def test_small_images_are_continued_by_their_mirror_image() -> None:
    model = tiny_kl()
    model.tile_sample_min_size, model.tile_latent_min_size = 32, 16
    figures, picture = seam_test(FirstStage(model), held(1, side=5), 4)
    assert figures["side"] == 44
    assert figures["images"] == 1
    assert picture is not None


def test_what_diffusers_cannot_tile_is_said() -> None:
    assert seam_test(FirstStage(tiny_vq()), held(1), 1)[0] == {
        "note": "diffusers has no tiled decoding for VQModel"
    }
    # diffusers takes every AutoencoderTiny for f8; a true one is measured.
    assert "tiled decoding fails" in seam_test(FirstStage(tiny_taesd()), held(1), 1)[0]["note"]
    taesd = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    ).eval()  # fmt: skip
    taesd.tile_sample_min_size, taesd.tile_latent_min_size = 64, 8
    assert seam_test(FirstStage(taesd), held(1), 1)[0]["tile"] == 64


def test_the_ten_that_gained_least_are_shown() -> None:
    ranked = np.random.default_rng(0).permutation(50).tolist()
    chosen = choose_by_gain(ranked, 12)
    assert set(ranked[:WORST]) <= set(chosen)
    assert ranked[-1] in chosen
    assert chosen == sorted(chosen)
    assert choose_by_gain(ranked, 4) == sorted(ranked[:4])
    assert choose_by_gain(ranked, 0) == []


def test_the_command_writes_one_page(tmp_path, capsys) -> None:
    before = tiny_kl()
    before.save_pretrained(tmp_path / "old")
    with_other_decoder(before).save_pretrained(tmp_path / "new")
    line = ["--data.path", str(pictures_in(tmp_path, 13)), "--output", str(tmp_path / "out")]
    line += ["--features", "none", "--data.workers", "0"]
    names = ["--first_stage", str(tmp_path / "new"), "--before", str(tmp_path / "old")]
    main([*line, *names])
    printed = capsys.readouterr().out
    assert "from old to new:" in printed
    assert "- Latents are the same bit for bit" in printed
    content, pairs = load(tmp_path / "out")
    assert [s["name"] for s in content["first_stages"]] == ["old", "new"]
    assert content["change"] == json.loads(json.dumps(content["change"]))
    assert len(content["change"]["per_image"]) == 13
    assert set(content["change"]["worst"]) <= {pair["index"] for pair in pairs}
    assert len(pairs) == 12
    page = (tmp_path / "out/report.html").read_text()
    for words in ("Before and after", "Latents are the same bit for bit", "Flat colors",
                  "Seams between tiles", "the 10 that gained least"):  # fmt: skip
        assert words in page, words
    assert page.index("Original, before and after") < page.index("Comparison</h2>")


def test_the_command_refuses_what_has_no_before_and_after(tmp_path) -> None:
    tiny_kl().save_pretrained(tmp_path / "a")
    tiny_kl(1).save_pretrained(tmp_path / "gray")
    a, gray = str(tmp_path / "a"), str(tmp_path / "gray")
    rest = ["--data.path", "photos", "--output", str(tmp_path / "out"), "--features", "none"]
    for line, words in (
        (["--first_stage", a, gray, "--before", a], "--first_stage names 2: give one"),
        (["--first_stage", a, "--before", a], "are both .*: there is nothing between them"),
        (["--first_stage", a, "--before", gray], "images of 1 channels, but"),
        (["--first_stage", a, "--before", str(tmp_path / "b")], "--before .*does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            main([*line, *rest])


def test_images_of_any_channels_come_from_files(tmp_path) -> None:
    before = tiny_kl(1)
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 3))), 1)
    found = evaluate_change(("old", before), ("new", with_other_decoder(before)), images)
    assert len(found.pairs) == 3
    assert all(len(pair.reconstructions) == 2 for pair in found.pairs)
