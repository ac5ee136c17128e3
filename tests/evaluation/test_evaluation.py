import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoencoders import pictures_in, tiny_dc, tiny_kl, tiny_taesd, tiny_vq
from diffusers import UNet2DModel
from torch import nn

from first_stage.data import FixedImages, View, open_source
from first_stage.errors import UserError
from first_stage.evaluation import (
    EvaluationImages,
    HeldImages,
    Options,
    comparison_table,
    evaluate,
    load,
    save,
)
from first_stage.evaluation.images import batches
from first_stage.evaluation.pictures import choose_pairs
from first_stage.evaluation.table import remarks
from first_stage.metrics import images as metrics
from first_stage.metrics.feature_networks import FeatureNetwork
from first_stage.models.first_stage import as_first_stage, pad, reconstruct

EVERY = [tiny_kl, tiny_vq, tiny_taesd, tiny_dc]


class Exact(nn.Module):
    """An autoencoder that loses nothing: latents are pixels, moved into channels."""

    def __init__(self, damage: float = 0.0):
        super().__init__()
        self.config = SimpleNamespace(in_channels=3)
        self.weight = nn.Parameter(torch.tensor(damage))

    def encode(self, x):
        return SimpleNamespace(latents=nn.functional.pixel_unshuffle(x, 2))

    def decode(self, z):
        return SimpleNamespace(sample=nn.functional.pixel_shuffle(z, 2) + self.weight)


def held(pixels: np.ndarray, ids: list[str] | None = None) -> HeldImages:
    ids = ids or [f"image-{k}" for k in range(len(pixels))]
    return HeldImages(FixedImages(torch.from_numpy(pixels), ids), "held")


def random_pixels(count: int, side: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def projection() -> FeatureNetwork:
    weights = torch.randn(3 * 4 * 4, 5, generator=torch.Generator().manual_seed(0))

    def network(images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ weights

    return FeatureNetwork("mine:net", "FD-mine:net", network)


@pytest.mark.parametrize("make", EVERY)
def test_any_autoencoder_reconstructs_any_size(make) -> None:
    stage = as_first_stage(make(), "it")
    assert stage.downsample_factor == 2
    images = torch.rand(2, 3, 15, 22) * 2 - 1
    decoded, encoded = reconstruct(stage, images)
    assert decoded.shape == images.shape
    assert encoded.latents.shape == (2, stage.latent_channels, 8, 11)
    assert (encoded.logvar is not None) == (make is tiny_kl)
    # Even sizes pass unpadded; odd ones repeat their last row and column.
    padded = torch.cat([images, images[..., -1:, :]], dim=-2)
    torch.testing.assert_close(pad(images, 2), padded)
    torch.testing.assert_close(reconstruct(stage, padded)[0][..., :15, :], decoded)


def test_latents_are_the_mode() -> None:
    vae = tiny_kl()
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(as_first_stage(vae, "it").encode(images).latents, expected)


def test_what_is_no_autoencoder_of_images_is_refused() -> None:
    unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(UserError, match="UNet2DModel, not an autoencoder"):
        as_first_stage(unet, "unet")

    class Enlarging(Exact):
        def decode(self, z):
            return SimpleNamespace(
                sample=nn.functional.interpolate(super().decode(z).sample, scale_factor=2)
            )

    with pytest.raises(UserError, match=r"\(1, 3, 64, 64\) came back as \(1, 3, 128, 128\)"):
        as_first_stage(Enlarging(), "enlarging")

    class Video(Exact):
        def encode(self, x):
            _, _, _frames, _, _ = x.shape

    with pytest.raises(UserError, match=r"does not encode and decode images.*expected 5"):
        as_first_stage(Video(), "video")


def test_figures_equal_those_of_the_metrics() -> None:
    vae, pixels = tiny_kl(), random_pixels(5)
    images = metrics.eight_bit(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    result = evaluate([("it", vae)], held(pixels), Options(batch_size=2, pairs=0))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    psnr = metrics.psnr(images, metrics.eight_bit(decoded))
    stage = result.first_stages[0]
    # A pixel at the edge between two levels may fall either way in another batch.
    assert [row["psnr"] for row in stage["per_image"]] == pytest.approx(psnr.tolist(), abs=1e-2)
    assert stage["metrics"]["psnr"]["mean"] == pytest.approx(
        np.mean([row["psnr"] for row in stage["per_image"]])
    )
    assert stage["metrics"]["psnr"]["images"] == 5
    assert [row["id"] for row in stage["per_image"]] == [f"image-{k}" for k in range(5)]
    assert stage["latent_channels"] == 4
    assert stage["downsample_factor"] == 2
    assert stage["values_per_latent"] == 3.0
    assert len(stage["latent_health"]["channels"]) == 4
    assert sum(stage["latent_health"]["channels"][0]["histogram"]["counts"]) == 5 * 64


def test_reconstructions_are_rounded_not_truncated() -> None:
    # Every value is 0.3 of a level off: rounding restores the original, truncation would not.
    shift = -0.3 / 127.5
    result = evaluate([("it", Exact(shift))], held(random_pixels(3)), Options(pairs=0))
    assert all(row["identical"] for row in result.first_stages[0]["per_image"])


def test_identical_and_constant_images_are_said_not_nan(tmp_path) -> None:
    pixels = random_pixels(3)
    pixels[1] = 128
    result = evaluate([("it", Exact())], held(pixels), Options(networks=(projection(),)))
    text = save(result, tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    stage = json.loads(text)["first_stages"][0]
    psnr = stage["metrics"]["psnr"]
    assert psnr["mean"] is None
    assert psnr["identical_images"] == 3
    assert [row["identical"] for row in stage["per_image"]] == [True] * 3
    assert [row["psnr"] for row in stage["per_image"]] == [None] * 3
    assert stage["per_image"][1]["ssim"] == pytest.approx(1.0)
    assert stage["per_image"][1]["high_frequency_kept"] is None  # it has no detail to keep
    assert "3 reconstruction(s) equal their originals exactly" in " ".join(remarks([stage]))
    assert "PSNR" not in comparison_table([stage])
    # One of them damaged: the mean is over the others, and the identical ones are counted.
    worse = evaluate([("it", Exact(0.1))], held(pixels), Options(pairs=0)).first_stages[0]
    assert worse["metrics"]["psnr"]["identical_images"] == 0
    expected = -10 * math.log10((13 / 255) ** 2)  # 0.1 on the [-1, 1] scale is 13 whole levels
    assert worse["per_image"][1]["psnr"] == pytest.approx(expected, abs=1e-4)


def test_every_image_counts_once_for_any_number_of_processes(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 23)))
    images = EvaluationImages(source, 3)
    for world in (1, 2, 3, 5):
        seen = [
            (index, tuple(group.indices))
            for rank in range(world)
            for groups, _ in batches(images, 4, rank, world)
            for group in groups
            for index in group.indices
        ]
        assert sorted(index for index, _ in seen) == list(range(23))
        if world == 1:
            alone = dict(seen)
        assert dict(seen) == alone  # the same neighbours in the batch


def test_the_answer_does_not_depend_on_the_batch_size(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 13)))
    results = [
        evaluate(
            [("it", tiny_kl())],
            EvaluationImages(source, 3),
            Options(batch_size=size, networks=(projection(),), pairs=0),
        ).first_stages[0]
        for size in (1, 5, 13)
    ]
    for other in results[1:]:
        for path in (("metrics", "psnr"), ("metrics", "ssim"), ("metrics", "l1")):
            a, b = results[0][path[0]][path[1]]["mean"], other[path[0]][path[1]]["mean"]
            assert a == pytest.approx(b, abs=1e-3), path
        a, b = (r["features"]["FD-mine:net"]["frechet_distance"] for r in (results[0], other))
        assert a == pytest.approx(b, rel=1e-3)
        assert results[0]["latent_health"]["kl"] == pytest.approx(other["latent_health"]["kl"])


def test_unreadable_images_are_listed_and_left_out(tmp_path) -> None:
    folder = pictures_in(tmp_path, 4)
    (folder / "01.png").write_bytes(b"no image")
    result = evaluate(
        [("it", tiny_kl())], EvaluationImages(open_source(str(folder)), 3), Options(batch_size=2)
    )
    stage = result.first_stages[0]
    assert [row["id"] for row in stage["per_image"]] == ["00.png", "02.png", "03.png"]
    assert list(stage["unreadable"]) == ["01.png"]
    assert result.protocol["images"] == 3
    assert result.protocol["unreadable_images"] == 1
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 4 images.*can be decoded \(first: 00.png"):
        evaluate([("it", tiny_kl())], EvaluationImages(open_source(str(folder)), 3))


def test_a_choice_of_images_follows_the_seed(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 20)))
    first, again = (EvaluationImages(source, 3, count=6, seed=1).chosen for _ in range(2))
    other = EvaluationImages(source, 3, count=6, seed=2).chosen
    assert first.tolist() == again.tolist() == sorted(set(first.tolist()))
    assert len(first) == 6
    assert first.tolist() != other.tolist()


def test_resize_and_crop_are_in_the_protocol(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 2)))
    images = EvaluationImages(source, 3, View(16, 20))
    protocol = evaluate([("it", tiny_kl())], images, seed=5).protocol
    assert protocol["crop"] == "centre, 16 x 16"
    assert protocol["resize"] == "shorter side to 20, bicubic, antialiased"
    assert protocol["seed"] == 5
    assert protocol["latents"] == "mode of the posterior"
    assert "rounded to 8 bits" in protocol["pixels"]


def test_first_stages_of_different_channels_are_refused(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 3)))
    with pytest.raises(UserError, match=r"'gray' takes images of 1 channels.*for 'colour'"):
        evaluate(
            [("colour", tiny_kl(3)), ("gray", tiny_kl(1))],
            lambda channels: EvaluationImages(source, channels),
        )
    with pytest.raises(UserError, match=r"'two' takes images of 2 channels, but .* into 3"):
        evaluate([("two", tiny_kl(2))], EvaluationImages(source, 3))
    with pytest.raises(UserError, match="3 channels, but 2 are asked for"):
        evaluate([("two", tiny_kl(2))], lambda channels: EvaluationImages(source, channels))


def test_gray_first_stages(tmp_path) -> None:
    source = open_source(str(pictures_in(tmp_path, 3)))
    options = Options(networks=(projection(),))
    result = evaluate([("gray", tiny_kl(1))], lambda c: EvaluationImages(source, c), options)
    assert result.pairs[0].original.shape[-1] == 1
    save(result, tmp_path / "out")
    assert result.first_stages[0]["features"]["FD-mine:net"]["frechet_distance"] > 0


def test_damaged_weights_are_said() -> None:
    with pytest.raises(
        UserError, match="'it' gives NaN or infinite pixels for the image 'image-0'"
    ):
        evaluate([("it", Exact(math.nan))], held(random_pixels(2)))


def test_images_too_small_for_a_metric_have_none() -> None:
    stage = evaluate([("it", Exact(0.1))], held(random_pixels(2, 4)), Options()).first_stages[0]
    assert stage["metrics"]["ssim"]["mean"] is None
    assert stage["metrics"]["psnr"]["mean"] > 0
    assert stage["latent_health"]["equivariance"]["scale_0.5"]["psnr_change"] is not None


def test_one_image_has_no_frechet_distance() -> None:
    options = Options(networks=(projection(),))
    stage = evaluate([("it", tiny_kl())], held(random_pixels(1)), options).first_stages[0]
    assert stage["features"]["FD-mine:net"]["frechet_distance"] is None
    assert "one image" in stage["features"]["FD-mine:net"]["note"]


def test_pairs_hold_the_worst_the_best_and_what_lies_between() -> None:
    rows = [{"index": k, "psnr": float((k * 37) % 50), "identical": False} for k in range(50)]
    rows[7] |= {"psnr": None, "identical": True}
    chosen = choose_pairs(rows, 9)
    ranked = sorted(range(50), key=lambda k: (rows[k]["identical"], rows[k]["psnr"] or 0))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 9
    assert set(ranked[:3]) <= set(chosen)
    assert 7 in chosen
    assert choose_pairs(rows[:4], 9) == [0, 1, 2, 3]
    assert choose_pairs(rows, 0) == []
    assert len(choose_pairs(rows, 1)) == 1


def test_saved_and_loaded(tmp_path) -> None:
    result = evaluate(
        [("a", tiny_kl()), ("b", tiny_vq())], held(random_pixels(6)), Options(pairs=3)
    )
    save(result, tmp_path)
    content, pairs = load(tmp_path)
    assert content["first_stages"] == json.loads(json.dumps(result.first_stages))
    assert len(pairs) == 3
    for pair in pairs:
        assert len(pair["reconstructions"]) == len(pair["latents"]) == 2
        assert (tmp_path / pair["original"]).is_file()
    before = sorted(tmp_path.rglob("*.png"))
    save(evaluate([("a", tiny_kl())], held(random_pixels(6)), Options(pairs=1)), tmp_path)
    assert len(sorted(tmp_path.rglob("*.png"))) < len(before)  # nothing old is left behind


def test_another_format_is_refused(tmp_path) -> None:
    (tmp_path / "metrics.json").write_text('{"format": "something"}')
    with pytest.raises(UserError, match="has the format 'something'"):
        load(tmp_path)


def test_the_table_marks_the_better_one() -> None:
    pixels = random_pixels(4)
    result = evaluate([("good", Exact(0.05)), ("bad", Exact(0.2))], held(pixels), Options(pairs=0))
    lines = comparison_table(result.first_stages).splitlines()
    psnr = next(line for line in lines if line.startswith("PSNR ↑"))
    good, bad = (s["metrics"]["psnr"]["mean"] for s in result.first_stages)
    assert psnr.split()[2:] == [f"{good:.2f}", "dB*", f"{bad:.2f}", "dB"]
