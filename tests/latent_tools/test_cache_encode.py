import errno
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_helpers import (
    ROOT,
    NumberReader,
    cache,
    make_vae,
    number_of,
    numbered,
    options,
    photo,
    shard_hashes,
    write_photos,
)
from diffusers import AutoencoderDC, AutoencoderTiny, VQModel
from PIL import Image

from first_stage.data import (
    View,
    images_from_pixels,
    open_image,
    open_source,
    pixels_of,
    too_many,
)
from first_stage.errors import UserError
from first_stage.models.first_stage import as_first_stage
from latent_tools import LatentDataset, Manifest, precompute
from latent_tools.build import unit
from latent_tools.build.encoder import BatchSplitter, LatentEncoder, allow_compiling
from latent_tools.build.stopped import why_stopped
from latent_tools.format.files import LaunchLock
from latent_tools.format.shards import read_commit


def images_of(folder, names, view=None):
    """The images as the trainer would see them."""
    view = view or View(16, 16)
    pictures = [view.apply(open_image(folder / name, 3))[0] for name in names]
    pixels = np.stack([pixels_of(p, 3) for p in pictures])
    return images_from_pixels(torch.from_numpy(pixels)).contiguous()


def moments(vae, images):
    with torch.no_grad():
        posterior = vae.encode(images, return_dict=False)[0]
        return torch.cat([posterior.mean, posterior.logvar], 1)


def stored(dataset, flipped=False):
    return torch.stack([dataset.stored(n, flipped) for n in range(len(dataset))])


def reasons(output):
    rows = pq.read_table(output / "failures.parquet").to_pylist()
    return {row["id"]: row["reason"] for row in rows}


class TestValues:
    def test_float32_equals_encode_exactly_at_the_same_batch(self, tmp_path):
        write_photos(tmp_path / "data", 4)
        vae = make_vae()
        cache(tmp_path / "data", tmp_path / "c", vae, dtype="float32", flip=True)
        dataset = LatentDataset(tmp_path / "c")
        images = images_of(tmp_path / "data", dataset.ids)
        assert torch.equal(stored(dataset), moments(vae, images))
        # The latent of the mirrored image, which is not the mirrored latent.
        flipped = stored(dataset, flipped=True)
        assert torch.equal(flipped, moments(vae, images.flip(3)))
        assert not torch.allclose(flipped, stored(dataset).flip(3), atol=1e-2)

    @pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
    def test_half_types_are_within_their_rounding(self, tmp_path, dtype, bound):
        write_photos(tmp_path / "data", 6)
        vae = make_vae()
        cache(tmp_path / "data", tmp_path / "c", vae, dtype=dtype)
        dataset = LatentDataset(tmp_path / "c")
        truth = moments(vae, images_of(tmp_path / "data", dataset.ids))
        difference = (stored(dataset) - truth).abs()
        assert (difference <= bound * truth.abs() + 1e-6).all()
        assert difference.max() > 0
        for name, part in (("storage_error", slice(4)), ("storage_error_logvar", slice(4, 8))):
            error = dataset.stats[name]
            np.testing.assert_allclose(error["max"], difference[:, part].max(), rtol=1e-2)

    def test_encoding_in_less_than_float32_says_what_it_changed(self, tmp_path):
        write_photos(tmp_path / "data", 8)
        vae = make_vae()
        cache(tmp_path / "data", tmp_path / "c", vae, dtype="float32", precision="bf16")
        dataset = LatentDataset(tmp_path / "c")
        assert dataset.stats["storage_error"]["max"] == 0.0
        truth = moments(vae, images_of(tmp_path / "data", dataset.ids))
        difference = (stored(dataset) - truth)[:2]  # two samples of the unit are measured
        for name, part in (("precision_error", slice(4)), ("precision_error_logvar", slice(4, 8))):
            found = difference[:, part].double()
            assert found.abs().max() > 1e-4
            error = dataset.stats[name]
            np.testing.assert_allclose(error["max"], found.abs().max(), rtol=1e-2)
            np.testing.assert_allclose(error["rms"], found.square().mean().sqrt(), rtol=1e-2)
        cache(tmp_path / "data", tmp_path / "exact", vae, dtype="float32")
        assert "precision_error" not in LatentDataset(tmp_path / "exact").stats

    def test_uint8_is_within_half_a_level_and_says_its_error(self, tmp_path):
        write_photos(tmp_path / "data", 6)
        vae = make_vae()
        cache(tmp_path / "data", tmp_path / "c", vae, dtype="uint8")
        dataset = LatentDataset(tmp_path / "c")
        truth = moments(vae, images_of(tmp_path / "data", dataset.ids))
        difference = (stored(dataset) - truth).abs()
        level = (truth.amax((2, 3)) - truth.amin((2, 3)))[:, :, None, None] / 255
        assert (difference <= 0.51 * level + 1e-6).all()
        # Means and log-variances have different units: their errors are not pooled.
        for name, part in (("storage_error", slice(4)), ("storage_error_logvar", slice(4, 8))):
            error, found = dataset.stats[name], difference[:, part].double()
            expected = [found.max(), found.square().mean().sqrt()]
            np.testing.assert_allclose([error["max"], error["rms"]], expected, rtol=1e-2)

    @pytest.mark.parametrize("representation", ["mean", "sample"])
    def test_mean_and_samples(self, tmp_path, representation):
        write_photos(tmp_path / "data", 6)
        vae = make_vae()
        for name, batch in (("a", 4), ("b", 3)):
            cache(
                tmp_path / "data", tmp_path / name, vae, dtype="float32", batch_size=batch,
                representation=representation, flip=True,
            )  # fmt: skip
        dataset = LatentDataset(tmp_path / "a")
        mean, logvar = moments(vae, images_of(tmp_path / "data", dataset.ids)).chunk(2, 1)
        noise = (stored(dataset) - mean) / torch.exp(0.5 * logvar)
        # A frozen draw depends on the sample alone, not on its batch.
        again = stored(LatentDataset(tmp_path / "b"))
        torch.testing.assert_close(stored(dataset), again, rtol=1e-4, atol=1e-5)
        if representation == "mean":
            assert noise.abs().max() < 1e-3
        else:
            assert abs(float(noise.std()) - 1) < 0.1
            assert len({round(float(n[0, 0, 0]), 4) for n in noise}) == 6

    @pytest.mark.parametrize("unit_size", [3, 64])
    def test_statistics_equal_one_shot_in_float64(self, tmp_path, unit_size):
        write_photos(tmp_path / "data", 5)
        vae = make_vae()
        cache(tmp_path / "data", tmp_path / "c", vae, flip=True, unit_size=unit_size)
        write_photos(tmp_path / "data", 6, first=5)  # and grown
        cache(tmp_path / "data", tmp_path / "c", vae, flip=True, unit_size=unit_size)
        dataset = LatentDataset(tmp_path / "c")
        mean, logvar = stored(dataset).double().chunk(2, 1)
        axes = (0, 2, 3)
        within = logvar.exp().mean(axes)
        expected = {
            "mean": mean.mean(axes),
            "mean_std": mean.var(axes, correction=0).sqrt(),
            "posterior_std": within.sqrt(),
            "std": (mean.var(axes, correction=0) + within).sqrt(),
        }
        assert dataset.stats["images"] == 11
        for name, values in expected.items():
            np.testing.assert_allclose(dataset.stats[name], values, rtol=1e-12)


class TestOtherFirstStages:
    def small(self):
        torch.manual_seed(0)
        return {
            "tiny": AutoencoderTiny(
                encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
            ),
            "vq": VQModel(
                block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3,
                num_vq_embeddings=8, down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            "dc": AutoencoderDC(
                in_channels=3, latent_channels=8, attention_head_dim=4,
                encoder_block_types=("ResBlock", "ResBlock"),
                decoder_block_types=("ResBlock", "ResBlock"),
                encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
                decoder_norm_types="rms_norm", decoder_act_fns="silu",
            ),
        }  # fmt: skip

    @pytest.mark.parametrize("kind", ["tiny", "vq", "dc"])
    def test_latents_without_a_posterior(self, tmp_path, kind):
        write_photos(tmp_path / "data", 4)
        model = self.small()[kind].eval()
        cache(tmp_path / "data", tmp_path / "c", model, dtype="float32")
        dataset = LatentDataset(tmp_path / "c", normalize="none", expect=model)
        assert dataset.manifest.representation == "mean"
        with torch.no_grad():
            truth = model.encode(images_of(tmp_path / "data", dataset.ids), return_dict=False)[0]
        found = torch.stack([dataset[n]["latents"] for n in range(4)])
        assert torch.equal(found, truth)
        assert dataset.decode_preview(dataset.ids[:1], model)[0].shape == (3, 16, 16)

    def test_moments_without_a_posterior_are_refused(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        with pytest.raises(UserError, match="no posterior"):
            cache(tmp_path / "data", tmp_path / "c", self.small()["tiny"], representation="moments")

    def test_codebook_and_decoder_belong_to_the_decoder(self, tmp_path):
        write_photos(tmp_path / "data", 2)
        model = self.small()["vq"]
        cache(tmp_path / "data", tmp_path / "c", model)
        with torch.no_grad():
            model.quantize.embedding.weight += 1.0
        assert cache(tmp_path / "data", tmp_path / "c", model).images == 0

    def test_what_does_not_encode_images_is_refused(self, tmp_path):
        write_photos(tmp_path / "data", 1)

        class Video(NumberReader):
            config = SimpleNamespace(in_channels=3)

            def encode(self, x):
                raise ValueError("expected 5 dimensions")

        with pytest.raises(UserError, match="does not encode images: expected 5 dimensions"):
            cache(tmp_path / "data", tmp_path / "c", Video())

    def test_resolution_must_fit_the_downsample_factor(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        with pytest.raises(UserError, match=r"resolution 17 is no multiple .* factor 2: use 16"):
            cache(tmp_path / "data", tmp_path / "c", resolution=17)


class TestPairing:
    def folder(self, root):
        """Numbered images; class folders tell the number's last bit; one name twice over."""
        for number in range(40):
            path = root / f"odd{number % 2}" / f"same{number // 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            numbered(number).save(path)
        for number, suffix in ((300, "png"), (302, "bmp"), (304, "tif")):
            numbered(number).save(root / "odd0" / f"cat.{suffix}")
        numbered(301).save(root / "odd1" / "cat.png")

    def number(self, name):
        fixed = {"odd0/cat.png": 300, "odd1/cat.png": 301, "odd0/cat.bmp": 302, "odd0/cat.tif": 304}
        if name in fixed:
            return fixed[name]
        folder, file = name.split("/")
        return 2 * int(file[4:-4]) + int(folder[3:])

    @pytest.mark.parametrize("workers", [0, 2])
    def test_ids_labels_and_flips_never_part(self, tmp_path, workers):
        self.folder(tmp_path / "data")
        cache(
            tmp_path / "data", tmp_path / "c", NumberReader(), dtype="float32", flip=True,
            resolution=8, resize=8, batch_size=3, unit_size=7, workers=workers,
        )  # fmt: skip
        dataset = LatentDataset(tmp_path / "c", normalize="none", flip=0.5)
        assert len(dataset) == len(set(dataset.ids)) == 44
        flips = set()
        for epoch in range(3):
            dataset.set_epoch(epoch)
            loader = torch.utils.data.DataLoader(
                dataset, batch_size=5, shuffle=True, num_workers=workers
            )
            seen = 0
            for batch in loader:
                for row, name in enumerate(batch["id"]):
                    number, flipped = number_of(batch["latents"][row])
                    assert number == self.number(name)
                    assert flipped == bool(batch["flipped"][row])
                    assert int(batch["label"][row]) == number % 2
                    assert batch["class"][row] == f"odd{number % 2}"
                    flips.add((name, flipped))
                    seen += 1
            assert seen == 44
        assert {flipped for _, flipped in flips} == {True, False}

    def test_captions_of_a_data_set_with_columns(self, tmp_path):
        import datasets

        rows = {
            "image": [numbered(n) for n in range(9)],
            "caption": [f"number {n}" if n != 4 else None for n in range(9)],
            "tags": [[str(n), "x"] for n in range(9)],
            "other": list(range(9)),
        }
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
        common = {"resolution": 8, "resize": 8, "dtype": "float32", "unit_size": 4}
        cache(tmp_path / "data", tmp_path / "a", NumberReader(), **common)
        assert "other" not in LatentDataset(tmp_path / "a")[0]
        cache(
            tmp_path / "data", tmp_path / "b", NumberReader(), columns=("caption", "tags", "other"),
            **common,
        )  # fmt: skip
        dataset = LatentDataset(tmp_path / "b", normalize="none")
        for item in (dataset[n] for n in range(9)):
            number, _ = number_of(item["latents"])
            assert item["caption"] == (f"number {number}" if number != 4 else None)
            assert item["tags"] == [str(number), "x"]
            assert item["other"] == number
        with pytest.raises(UserError, match=r"columns has 'nope'.*caption, tags, other"):
            cache(tmp_path / "data", tmp_path / "d", NumberReader(), columns=("nope",), **common)


class TestBuckets:
    def test_shapes_sizes_and_crops(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        sizes = {"wide": (64, 32), "tall": (30, 62), "square": (40, 40), "odd": (50, 30)}
        for name, size in sizes.items():
            photo(1, size).save(folder / f"{name}.png")
        turned = Image.Exif()
        turned[0x0112] = 6  # a quarter turn: stored wide, seen tall
        photo(2, (64, 32)).save(folder / "turned.jpg", exif=turned)
        vae = make_vae()
        cache(folder, tmp_path / "c", vae, dtype="float32", buckets="16x16,16x32,32x16")
        dataset = LatentDataset(tmp_path / "c", sample="mean", normalize="none")
        shapes = {n: tuple(s) for n, s in zip(dataset.ids, dataset.shapes.tolist(), strict=True)}
        assert shapes == {
            "wide.png": (16, 32), "tall.png": (32, 16), "square.png": (16, 16),
            "odd.png": (16, 32), "turned.jpg": (32, 16),
        }  # fmt: skip
        items = {item["id"]: item for item in (dataset[n] for n in range(5))}
        assert items["odd.png"]["original_size"].tolist() == [30, 50]
        assert items["turned.jpg"]["original_size"].tolist() == [64, 32]
        assert items["odd.png"]["crop"].tolist() == [1, 0]  # 50x30 covers 32x16 as 32x19
        for name, (height, width) in shapes.items():
            view = View(16, 16, (height, width))
            mean, _ = moments(vae, images_of(folder, [name], view)).chunk(2, 1)
            torch.testing.assert_close(items[name]["latents"], mean[0], rtol=1e-4, atol=1e-5)
        files = sorted(shard_hashes(tmp_path / "c"))
        assert files == [
            "b16x16-u000000.safetensors",
            "b16x32-u000001.safetensors",
            "b32x16-u000002.safetensors",
        ]

    def test_a_view_of_a_shape_just_covers_it(self):
        image, crop = View(8, None, (8, 24)).apply(photo(0, (100, 100)))
        assert image.size == (24, 8)
        assert crop == (8, 0)


class TestBadSamples:
    def test_only_the_broken_ones_fail(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        good = photo(0, (40, 30))
        good.save(folder / "good.png")
        good.convert("CMYK").save(folder / "cmyk.jpg")
        turned = Image.Exif()
        turned[0x0112] = 6
        good.save(folder / "turned.jpg", exif=turned)
        sixteen = (np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)
        Image.fromarray(sixteen).save(folder / "sixteen.png")
        good.convert("P").save(folder / "palette.png")
        photo(1, (300, 300)).save(folder / "whole.jpg")
        whole = (folder / "whole.jpg").read_bytes()
        (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "empty.png").write_bytes(b"")
        (folder / "text.png").write_text("not an image")
        (folder / "bomb.png").write_bytes(_bomb())
        output = tmp_path / "c"
        outcome = cache(folder, output, max_broken=0.5)
        assert outcome.failures == 4
        found = reasons(output)
        assert set(found) == {"truncated.jpg", "empty.png", "text.png", "bomb.png"}
        assert "decompression bomb" in found["bomb.png"]
        assert all(found.values())
        dataset = LatentDataset(output)
        assert set(dataset.ids) == {
            "good.png", "cmyk.jpg", "turned.jpg", "sixteen.png", "palette.png", "whole.jpg",
        }  # fmt: skip
        by_name = {dataset[n]["id"]: dataset[n]["original_size"].tolist() for n in range(6)}
        assert by_name["turned.jpg"] == [40, 30]
        assert stored(dataset).flatten(1).std(1).min() > 0  # nothing became zeros

    def test_too_many_stop_the_launch_and_raising_the_share_finishes_it(self, tmp_path):
        write_photos(tmp_path / "data", 18)
        for number in range(2):
            (tmp_path / "data" / "class0" / f"broken{number}.png").write_bytes(b"no")
        arguments = {"unit_size": 4}
        with pytest.raises(UserError, match=r"of 20 samples .*data.max_broken 0.05 .*broken\d.png"):
            cache(tmp_path / "data", tmp_path / "c", max_broken=0.05, **arguments)
        before = {f.name for f in (tmp_path / "c" / "commits").iterdir()}
        assert not (tmp_path / "c" / "index.parquet").exists()
        outcome = cache(tmp_path / "data", tmp_path / "c", max_broken=0.1, **arguments)
        assert outcome.is_complete
        assert outcome.already == len(before)
        assert len(LatentDataset(tmp_path / "c")) == 18

    @pytest.mark.parametrize(
        ("unit_size", "kept"),
        [(64, r"\. 0 of 1 units are committed: nothing is kept yet$"),
         (4, r"\. 2 of 5 units are committed and stay$")],
    )  # fmt: skip
    def test_the_stop_says_what_is_kept(self, tmp_path, unit_size, kept):
        write_photos(tmp_path / "data", 18)
        for number in range(2):  # behind the nine others of the first folder: in the third unit
            (tmp_path / "data" / "class0" / f"broken{number}.png").write_bytes(b"no")
        with pytest.raises(UserError, match=r"mend them and .*raise data\.max_broken" + kept):
            cache(tmp_path / "data", tmp_path / "c", unit_size=unit_size)

    def test_a_cache_counts_and_a_training_tests_as_the_page_says(self, tmp_path):
        page = (ROOT / "docs/guides/which-images.md").read_text(encoding="utf-8")
        (counted,) = re.findall(r"(\d+) of (\d+) are more than (0\.\d+)", page)
        broken, planned, share = int(counted[0]), int(counted[1]), float(counted[2])
        assert not too_many(broken, planned, share)  # a training goes on
        write_photos(tmp_path / "data", planned - broken)
        for number in range(broken):
            (tmp_path / "data" / "class0" / f"broken{number}.png").write_bytes(b"no")
        with pytest.raises(UserError, match=f"{broken} of {planned} samples cannot be encoded"):
            cache(tmp_path / "data", tmp_path / "c", max_broken=share)
        (tmp_path / "data" / "class0" / "broken0.png").unlink()
        assert cache(tmp_path / "data", tmp_path / "c", max_broken=share).failures == broken - 1

        (shown,) = re.findall(
            r"Of (0\.\d+) allowed, (\d+) samples are enough when all.* some (\d+) when a te", page
        )
        share, all_broken, a_tenth = float(shown[0]), int(shown[1]), int(shown[2])
        assert too_many(all_broken, all_broken, share)
        assert not too_many(all_broken - 1, all_broken - 1, share)
        first = next(n for n in range(10, 2000, 10) if too_many(n // 10, n, share))
        assert first == pytest.approx(a_tenth, rel=0.1)

    def test_mended_files_go_on_as_the_stop_says(self, tmp_path):
        folder, output = tmp_path / "data", tmp_path / "c"
        write_photos(folder, 18)
        broken = [folder / "class0" / f"broken{number}.png" for number in range(2)]
        for path in broken:
            path.write_bytes(b"no")
        cache(folder, output, unit_size=4, max_broken=0.1)
        for path in broken:
            photo(5).save(path)
        # Their unit is committed: what failed in it is tried again with --update alone.
        with pytest.raises(UserError, match=r"and add --update.* 5 of 5 units are committed and s"):
            cache(folder, output, unit_size=4)
        assert cache(folder, output, unit_size=4, update=True).failures == 0
        assert len(LatentDataset(output)) == 20

    def test_a_launch_that_begins_anew_forgets_why_the_last_one_stopped(self, tmp_path):
        def interrupted():
            raise KeyboardInterrupt

        folder, output = tmp_path / "data", tmp_path / "c"
        folder.mkdir()
        numbered(1).save(folder / "1.png")
        (folder / "2.png").write_bytes(b"no")
        source = open_source(str(folder))
        with pytest.raises(UserError, match="1 of 2 samples"):
            cache(folder, output)
        assert why_stopped(output).startswith("1 of 2 samples cannot be encoded")
        with pytest.raises(KeyboardInterrupt):  # info has the command of this one
            precompute(make_vae(), "test", source, output, options(max_broken=0.5),
                       accepted=interrupted)  # fmt: skip
        assert why_stopped(output) == ""

    def test_a_unit_of_broken_samples_alone(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        for number in range(3):
            (folder / f"{number}.png").write_bytes(b"no")
        cache(folder, tmp_path / "c", max_broken=1.0, unit_size=2)
        assert len(reasons(tmp_path / "c")) == 3
        assert len(LatentDataset(tmp_path / "c")) == 0


class Overflowing(NumberReader):
    """Not finite for some numbers: under autocast only, or always."""

    def __init__(self, in_half, always):
        super().__init__()
        self.in_half, self.always = in_half, always

    def encode(self, images):
        moments = super().encode(images)
        numbers = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        for row, number in enumerate(numbers):
            if number in self.always:
                moments[row, 0] = float("nan")
            elif number in self.in_half and torch.is_autocast_enabled("cpu"):
                moments[row, 1] = float("inf")
        return moments


class TestNotFinite:
    @pytest.fixture
    def numbers(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        for number in range(10):
            numbered(number).save(folder / f"{number}.png")
        return folder

    def test_once_more_in_float32_then_a_failure_never_zeros(self, tmp_path, numbers):
        encoder = Overflowing(in_half={2, 7}, always={5})
        outcome = cache(
            numbers, tmp_path / "c", encoder, dtype="float32", precision="bf16", flip=True,
            resolution=8, resize=8, max_broken=0.1,
        )  # fmt: skip
        assert set(reasons(tmp_path / "c")) == {"5.png"}
        assert "not finite" in reasons(tmp_path / "c")["5.png"]
        commit = read_commit(tmp_path / "c", 0)
        assert commit["retried_in_float32"] == ["2.png", "5.png", "7.png"]
        assert outcome.retried == 3
        dataset = LatentDataset(tmp_path / "c", normalize="none", flip=0.0)
        assert len(dataset) == 9
        for item in (dataset[n] for n in range(9)):
            if item["id"] in ("2.png", "7.png"):
                assert f"{number_of(item['latents'])[0]}.png" == item["id"]

    def test_outside_of_the_stored_type_is_a_failure(self, tmp_path, numbers):
        encoder = NumberReader()
        with torch.no_grad():
            encoder.weight.fill_(1e5)
        cache(numbers, tmp_path / "c", encoder, resolution=8, resize=8, max_broken=1.0)
        found = reasons(tmp_path / "c")
        assert len(found) == 10
        assert "outside the range of float16" in found["0.png"]

    def test_force_upcast_is_honoured(self):
        vae = make_vae()
        vae.register_to_config(force_upcast=True)
        cpu = torch.device("cpu")
        assert LatentEncoder(as_first_stage(vae, "x"), cpu, "fp16").precision == "no"
        assert LatentEncoder(as_first_stage(vae, "x"), cpu, "bf16").precision == "bf16"
        vae.register_to_config(force_upcast=False)
        assert LatentEncoder(as_first_stage(vae, "x"), cpu, "fp16").precision == "fp16"


class TestMemory:
    @pytest.mark.parametrize("how", ["cuda", "torch", "python"])
    def test_the_batch_is_halved_until_it_fits(self, tmp_path, how):
        write_photos(tmp_path / "data", 9)
        sizes = []

        class Full(NumberReader):
            def encode(self, images, return_dict=True):
                if images.shape[-1] == 16:
                    sizes.append(len(images))
                    if len(images) > 2 and how == "cuda":
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                    if len(images) > 2:
                        torch.empty(2**60) if how == "torch" else bytearray(2**60)
                return super().encode(images)

        outcome = cache(tmp_path / "data", tmp_path / "c", Full(), batch_size=8)
        assert sizes == [8, 4, 2, 2, 2, 2, 1]
        assert outcome.batch_size == 2
        cache(tmp_path / "data", tmp_path / "d", NumberReader(), batch_size=2)
        assert shard_hashes(tmp_path / "c") == shard_hashes(tmp_path / "d")

    def test_one_image_that_does_not_fit_says_so(self):
        class Full(NumberReader):
            def encode(self, images, return_dict=True):
                if images.shape[-1] == 64:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                return super().encode(images)

        splitter = BatchSplitter(LatentEncoder(as_first_stage(Full(), "x"), torch.device("cpu")), 4)
        with pytest.raises(UserError, match="one image of 64x64 does not fit"):
            splitter(torch.zeros(4, 3, 64, 64))

    def test_a_filled_up_batch_gives_the_same(self):
        encoder = LatentEncoder(as_first_stage(make_vae(), "x"), torch.device("cpu"))
        images = torch.randn(5, 3, 16, 16)
        padded = BatchSplitter(encoder, 4, is_padded=True)(images)
        assert padded.shape == (5, 8, 8, 8)
        torch.testing.assert_close(padded, BatchSplitter(encoder, 4)(images))


class TestContinuing:
    def test_nothing_is_encoded_again_and_growth_is_added(self, tmp_path):
        write_photos(tmp_path / "data", 10)
        output = tmp_path / "c"
        assert cache(tmp_path / "data", output, unit_size=4).images == 10
        done = [p for p in _files(output) if p.parent.name in ("shards", "commits")]
        assert len(done) == 6
        before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in done}
        again = cache(tmp_path / "data", output, unit_size=4)
        assert (again.images, again.already, again.is_complete) == (0, 3, True)
        write_photos(tmp_path / "data", 3, first=100)
        numbered(5).save(tmp_path / "data" / "class0" / "00000a.png")  # sorts between the others
        grown = cache(tmp_path / "data", output, unit_size=4)
        assert (grown.images, grown.already) == (4, 3)
        assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before} == before
        assert sorted(LatentDataset(output).ids) == sorted(
            open_source(str(tmp_path / "data")).id(n) for n in range(14)
        )

    def test_a_lost_commit_gives_the_same_bytes_again(self, tmp_path):
        write_photos(tmp_path / "data", 10)
        cache(tmp_path / "data", tmp_path / "c", unit_size=4)
        before = shard_hashes(tmp_path / "c")
        index = (tmp_path / "c" / "index.parquet").read_bytes()
        (tmp_path / "c" / "commits" / "u000001.json").unlink()
        (tmp_path / "c" / "shards" / "b16x16-u000001.safetensors").write_bytes(b"half a file")
        outcome = cache(tmp_path / "data", tmp_path / "c", unit_size=4)
        assert (outcome.units, outcome.images) == (1, 4)
        assert shard_hashes(tmp_path / "c") == before
        assert (tmp_path / "c" / "index.parquet").read_bytes() == index

    def test_a_shard_that_was_not_written_has_no_commit(self, tmp_path, monkeypatch):
        write_photos(tmp_path / "data", 10)
        output, write_atomic = tmp_path / "c", unit.write_atomic

        def write(path, content):
            if path.name.endswith("u000001.safetensors"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            write_atomic(path, content)

        monkeypatch.setattr(unit, "write_atomic", write)
        with pytest.raises(OSError, match="u000001"):
            cache(tmp_path / "data", output, unit_size=4)
        assert not (output / "commits" / "u000001.json").exists()
        assert (output / "commits" / "u000000.json").exists()

    def test_samples_gone_before_their_turn_are_failures(self, tmp_path):
        write_photos(tmp_path / "data", 8)
        cache(tmp_path / "data", tmp_path / "c", unit_size=4)
        (tmp_path / "c" / "commits" / "u000001.json").unlink()
        (tmp_path / "data" / "class1" / "00007.png").unlink()
        cache(tmp_path / "data", tmp_path / "c", unit_size=4, max_broken=0.5)
        assert reasons(tmp_path / "c") == {"class1/00007.png": "no longer in the data"}

    def test_other_data_under_the_same_ids_is_refused(self, tmp_path):
        for folder, first in (("a", 0), ("b", 50)):
            (tmp_path / folder).mkdir()
            for number in range(4):
                photo(first + number).save(tmp_path / folder / f"{number}.png")
        cache(tmp_path / "a", tmp_path / "c")
        with pytest.raises(
            UserError, match=r"4 changed of the 4 samples .*'0\.png'.*another --output"
        ):
            cache(tmp_path / "b", tmp_path / "c")
        (tmp_path / "e").mkdir()
        photo(0).save(tmp_path / "e" / "else.png")
        with pytest.raises(UserError, match=r"none of the 4 samples planned .* another data set"):
            cache(tmp_path / "e", tmp_path / "c")

    def test_a_mismatch_changes_nothing(self, tmp_path):
        write_photos(tmp_path / "data", 4)
        cache(tmp_path / "data", tmp_path / "c")
        before = {p: p.read_bytes() for p in _files(tmp_path / "c")}
        with pytest.raises(UserError, match=r"encoder weights: cache \w+, now \w+.*Nothing was ch"):
            cache(tmp_path / "data", tmp_path / "c", make_vae(seed=1))
        with pytest.raises(UserError, match=r"store\.flip: cache False, now True"):
            cache(tmp_path / "data", tmp_path / "c", flip=True)
        assert {p: p.read_bytes() for p in _files(tmp_path / "c")} == before

    def test_a_folder_with_other_things_is_refused(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "thesis.txt").write_text("x")
        with pytest.raises(UserError, match=r"is not empty \(it has 'thesis.txt'\)"):
            cache(tmp_path / "data", tmp_path / "c")
        assert os.listdir(tmp_path / "c") == ["thesis.txt"]

    def test_duplicate_ids_are_refused(self, tmp_path):
        class Twice:
            name, columns = "twice", ()

            def __len__(self):
                return 2

            def id(self, index):
                return "same"

        with pytest.raises(UserError, match="two samples with the id 'same'"):
            precompute(make_vae(), "x", Twice(), tmp_path / "c", options())

    def test_a_second_launch_meets_the_lock(self, tmp_path):
        """The lock is of the process: another one is needed to meet it."""
        import multiprocessing

        write_photos(tmp_path / "data", 2)
        cache(tmp_path / "data", tmp_path / "c")
        context = multiprocessing.get_context("fork")
        taken, done = context.Event(), context.Event()
        child = context.Process(target=_hold_lock, args=(tmp_path / "c", taken, done))
        child.start()
        assert taken.wait(20)
        with pytest.raises(UserError, match=f"another launch .pid {child.pid} on"):
            cache(tmp_path / "data", tmp_path / "c")
        done.set()
        child.join(20)
        assert cache(tmp_path / "data", tmp_path / "c").is_complete


class TestCompiling:
    """Each shape is compiled; dynamo by itself would leave all but eight uncompiled."""

    @pytest.fixture(autouse=True)
    def limits(self):
        torch._dynamo.reset()
        # Fails instead of a warning and an uncompiled pass.
        with torch._dynamo.config.patch(
            recompile_limit=8, accumulated_recompile_limit=10, fail_on_recompile_limit_hit=True
        ):
            yield

    def test_no_shape_is_left_out(self):
        double = torch.compile(lambda images: images * 2, backend="eager", dynamic=False)
        allow_compiling(shapes=6, batch_size=4)
        for side in range(1, 7):
            for batch in (4, 2, 1):
                assert double(torch.ones(batch, side)).sum() == 2 * batch * side

    @pytest.mark.slow
    def test_ten_shapes_compiled_equal_uncompiled(self, tmp_path, monkeypatch):
        # What a compilation that was killed left in the shared folder is not ours to read.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler"))
        shapes = [(16 + 2 * n, 36 - 2 * n) for n in range(10)]
        write_shapes(tmp_path / "data", shapes * 2)
        found = []
        for compile in (False, True):
            folder = tmp_path / f"compiled-{compile}"
            cache(
                tmp_path / "data", folder, NumberReader(), compile=compile, dtype="float32",
                buckets=",".join(f"{height}x{width}" for width, height in shapes),
            )  # fmt: skip
            dataset = LatentDataset(folder, sample="raw", normalize="none")
            found.append({n: dataset.stored(dataset.index_of(n)) for n in dataset.ids})
        eager, ours = found
        assert len(eager) == len(ours) == 20
        assert len({tuple(latents.shape) for latents in ours.values()}) == 10
        for name, latents in eager.items():
            torch.testing.assert_close(ours[name], latents, atol=1e-5, rtol=1e-5)


def write_shapes(folder, sizes):
    """A photo of each (width, height)."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        photo(number, size).save(folder / f"{number:02d}.png")


def test_files_grow_with_units_not_samples(tmp_path):
    write_photos(tmp_path / "data", 64)
    cache(tmp_path / "data", tmp_path / "c", unit_size=16)
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 4
    assert len(_files(tmp_path / "c")) == 4 + 4 + 8  # shards, commits, and the cache's own


def test_manifest_says_what_was_done(tmp_path):
    write_photos(tmp_path / "data", 4)
    cache(tmp_path / "data", tmp_path / "c", command="accelerate launch it")
    manifest = Manifest.load(tmp_path / "c")
    assert manifest.counts == {
        "samples": 4, "failures": 0, "units": 1,
        "bytes": (tmp_path / "c" / "shards" / "b16x16-u000000.safetensors").stat().st_size,
    }  # fmt: skip
    assert manifest.first_stage["scaling_factor"] == 1.7
    assert manifest.first_stage["shift_factor"] == 0.3
    assert manifest.preprocessing["pixel_range"] == [-1, 1]
    json.loads((tmp_path / "c" / "manifest.json").read_text())


def _files(output):
    return sorted(p for p in output.rglob("*") if p.is_file())


def _hold_lock(folder, taken, done):
    lock = LaunchLock(folder)
    lock.take()
    taken.set()
    done.wait(20)


def _bomb():
    """A small PNG that says it is 40,000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
