"""Training, evaluation and cache see the same data set: the same files, messages and exit codes."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cache_helpers import make_vae
from conftest import arguments
from data_folders import png, put, put_parquet, put_tar
from diffusers import AutoencoderKL
from PIL import Image
from shards import write_shards

from first_stage.commands import cache as cache_command
from first_stage.commands import evaluate as evaluate_command
from first_stage.config import parse_config
from first_stage.errors import UserError
from first_stage.training.loop import train
from latent_tools import LatentDataset


class Everywhere:
    """The three commands on one data set.

    Args:
        folder: Where they write.
        channels: Of the images.
    """

    def __init__(self, folder: Path, channels: int = 3):
        self.folder, self.channels = folder, channels
        self.vae = folder / "vae"
        make_vae(channels=channels).save_pretrained(self.vae)

    def train(self, data, **fields) -> str:
        fields = {"train.max_steps": 1, "data.validation_share": 0.34, **fields}
        line = arguments(self.folder / "run", data, **fields, **{"overwrite": True})
        line += ["--model.in_channels", str(self.channels)]
        return _printed(lambda: train(parse_config(line)))

    def evaluate(self, data, **fields) -> str:
        fields = {"data.resolution": 16, **fields}
        line = ["--first_stage", str(self.vae), "--data.path", str(data), "--features", "none"]
        line += ["--output", str(self.folder / "eval"), "--overwrite", "true", "--pairs", "2"]
        return _printed(lambda: evaluate_command.main([*line, *_flags(fields)]))

    def cache(self, data, **fields) -> str:
        self.made = self.folder / f"cache-{len(list(self.folder.glob('cache-*')))}"
        line = ["--first_stage", str(self.vae), "--data.path", str(data)]
        line += ["--output", str(self.made), "--data.resolution", "16"]
        return _printed(lambda: cache_command.main([*line, *_flags(fields)]))

    def metrics(self) -> dict:
        return json.loads((self.folder / "eval" / "metrics.json").read_text())

    def evaluated(self) -> list[str]:
        return [row["id"] for row in self.metrics()["first_stages"][0]["per_image"]]

    def cached(self) -> list[str]:
        return list(LatentDataset(self.made).ids)


def _flags(fields) -> list[str]:
    return [
        text
        for name, value in {"data.workers": 0, **fields}.items()
        for text in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def _printed(command) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        command()
    return stream.getvalue()


@pytest.fixture
def everywhere(tmp_path) -> Everywhere:
    (tmp_path / "out").mkdir()
    return Everywhere(tmp_path / "out")


def alike(everywhere, data, expected, words="", **fields) -> None:
    """All three commands read exactly these samples, and say the same."""
    counted = everywhere.train(data, **fields)
    assert f"{len(expected) - round(len(expected) * 0.34)} images to train on" in counted
    evaluated, cached = everywhere.evaluate(data, **fields), everywhere.cache(data, **fields)
    assert everywhere.evaluated() == expected
    assert sorted(everywhere.cached()) == sorted(expected)
    for text in (counted, evaluated, cached):
        assert words in text, text
    listed = (everywhere.folder / "run" / "files.txt").read_text()
    assert listed == (everywhere.folder / "eval" / "files.txt").read_text()
    assert listed == (everywhere.made / "files.txt").read_text()


def refused(everywhere, data, words, **fields) -> None:
    """All three commands refuse it in one line, with exit code 2."""
    for command in (everywhere.train, everywhere.evaluate, everywhere.cache):
        with pytest.raises(UserError, match=words) as caught:  # `run_command` makes it exit code 2
            command(data, **fields)
        assert "\n" not in str(caught.value)


def test_a_folder_with_everything_that_lies_in_folders(everywhere, tmp_path):
    data = put(tmp_path / "data", "cats/a.png", "cats/B.JPE", "dogs/c.png", "dogs/._c.png",
               "cats/@eaDir/t.png", "x.psd")  # fmt: skip
    with open(bytes(data / "dogs") + b"/caf\xe9.png", "wb") as stream:
        stream.write(png(7))
    put(tmp_path / "elsewhere", "z.png")
    (data / "dogs" / "linked.png").symlink_to(tmp_path / "elsewhere" / "z.png")
    (data / "cats" / "a.txt").write_text("a cat")
    expected = ["cats/B.JPE", "cats/a.png", "dogs/c.png", "dogs/caf\\xe9.png", "dogs/linked.png"]
    alike(everywhere, data, expected, "left out: 1 .psd: no known image format, such as x.psd")
    cache = LatentDataset(everywhere.made)
    captions = {name: cache[index]["caption"] for index, name in enumerate(cache.ids)}
    assert captions["cats/a.png"] == "a cat"
    assert captions["dogs/c.png"] is None


def test_splits_named_by_files_and_folders(everywhere, tmp_path):
    put_parquet(tmp_path / "p" / "data" / "train-0.parquet", (0, 1, 2))
    put_parquet(tmp_path / "p" / "data" / "test-0.parquet", (3,))
    ids = [f"data/train-0.parquet#{n:09d}" for n in range(3)]
    alike(everywhere, tmp_path / "p", ids, "1 shards of the split test", **{"data.split": "train"})
    refused(everywhere, tmp_path / "p", "has the splits: test, train", **{"data.split": "dogs"})
    put(tmp_path / "f", "a.png", "b.png", "c.png")
    refused(everywhere, tmp_path / "f", "named after a split", **{"data.split": "test"})


def test_a_validation_split_is_held_out(everywhere, tmp_path):
    put(tmp_path / "d", "train/0.png", "train/1.png", "val/2.png")
    (tmp_path / "d" / "val" / "2.png").write_bytes(png(9))
    printed = everywhere.train(tmp_path / "d", **{"data.validation_split": "validation"})
    assert "2 images to train on, 1 held out" in printed
    (tmp_path / "d" / "val" / "2.png").write_bytes(png(1))
    with pytest.raises(UserError, match="is trained on too"):
        everywhere.train(tmp_path / "d", **{"data.validation_split": "validation"})


def test_what_is_wrong_with_held_out_data_is_told_of_its_own_fields(everywhere, tmp_path):
    data, held = put(tmp_path / "d", "train/0.png", "val/1.png"), tmp_path / "data.path gone"
    for field, value, words in (
        ("validation_split", "dogs", "data.validation_split is 'dogs', but '.*/d' has the splits"),
        ("validation_path", held, "data.validation_path '.*/data.path gone' does not exist"),
        ("validation_path", data, "say which with data.validation_split, or all"),
        ("split", "dogs", "data.split is 'dogs', but"),
    ):
        with pytest.raises(UserError, match=f"^(.* has the splits .*: )?{words}"):
            everywhere.train(data, **{f"data.{field}": value})


def test_tars_streamed_and_not(everywhere, tmp_path):
    write_shards(tmp_path / "t", "tar", (3, 4), broken={2})
    put_tar(tmp_path / "t" / "nested" / "more.tar", 2, "jpg")
    for streaming in (False, True):
        fields = {"data.streaming": streaming, "data.max_broken": 0.5}
        everywhere.train(tmp_path / "t", **fields)
        everywhere.cache(tmp_path / "t", **fields)
        assert len(everywhere.cached()) == 8
    everywhere.evaluate(tmp_path / "t")
    assert sorted(everywhere.evaluated()) == sorted(everywhere.cached())
    first = everywhere.metrics()["first_stages"][0]
    assert list(first["unreadable"]) == ["shard-000.tar#folder/key002"]


def test_one_channel_of_twelve_bits(tmp_path):
    """The values come back within the range that was stated."""
    (tmp_path / "out").mkdir()
    everywhere = Everywhere(tmp_path / "out", channels=1)
    draw = np.random.default_rng(0)
    (tmp_path / "d").mkdir()
    for number in range(3):
        values = draw.integers(0, 4065, (20, 24), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "d" / f"{number}.png")
    for command in (everywhere.train, everywhere.evaluate, everywhere.cache):
        assert "warning: the values of" in command(tmp_path / "d")
        said = command(tmp_path / "d", **{"data.value_range": "[0,4095]"})
        assert "warning: the values" not in said
    manifest = LatentDataset(everywhere.made).manifest
    assert manifest.preprocessing["value_range"] == [0, 4095]


def test_a_launch_that_is_refused_leaves_the_list_of_files(everywhere, tmp_path):
    put(tmp_path / "d", "0.png", "1.png")
    put(tmp_path / "e", "2.png", "3.psd")
    everywhere.cache(tmp_path / "d")
    line = ["--first_stage", str(everywhere.vae), "--output", str(everywhere.made),
            "--data.resolution", "16", "--data.workers", "0"]  # fmt: skip
    before = (everywhere.made / "files.txt").read_text()
    with pytest.raises(UserError):
        cache_command.main([*line, "--data.path", str(tmp_path / "e"), "--data.color", "keep"])
    assert (everywhere.made / "files.txt").read_text() == before
    put(tmp_path / "d", "2.png", "3.psd")
    cache_command.main([*line, "--data.path", str(tmp_path / "d")])
    assert "- 3.psd" in (everywhere.made / "files.txt").read_text()


def test_a_cache_of_streamed_tables_says_what_it_leaves_out(everywhere, tmp_path):
    put_parquet(tmp_path / "p" / "train-0.parquet", (0, 1, 2))
    put_parquet(tmp_path / "p" / "test-0.parquet", (3,))
    printed = everywhere.cache(tmp_path / "p", **{"data.streaming": True, "data.split": "train"})
    assert "left out: 1 shards of the split test" in printed
    assert "- test-0.parquet" in (everywhere.made / "files.txt").read_text()
    assert len(everywhere.cached()) == 3


def test_a_changed_range_or_color_is_another_cache(everywhere, tmp_path):
    put(tmp_path / "d", "0.png", "1.png", "2.png")
    line = ["--first_stage", str(everywhere.vae), "--data.path", str(tmp_path / "d"),
            "--output", str(tmp_path / "c"), "--data.resolution", "16",
            "--data.workers", "0"]  # fmt: skip
    cache_command.main(line)
    for flag, value in (("color", "keep"), ("value_range", "[0,200]"), ("channels", "[2,1,0]")):
        with pytest.raises(
            UserError, match=f"preprocessing.{'select' if flag == 'channels' else flag}"
        ):
            cache_command.main([*line, f"--data.{flag}", value])


def test_five_channels(tmp_path):
    (tmp_path / "out").mkdir()
    everywhere = Everywhere(tmp_path / "out", channels=5)
    draw = np.random.default_rng(0)
    (tmp_path / "d").mkdir()
    for number in range(3):
        values = draw.integers(0, 65536, (20, 24, 5), dtype=np.uint16)
        if number:
            np.save(tmp_path / "d" / f"{number}.npy", values)
        else:
            tifffile.imwrite(
                tmp_path / "d" / "0.tif", values, planarconfig="contig", photometric="minisblack"
            )
    everywhere.train(tmp_path / "d", **{"train.max_steps": 2})
    printed = everywhere.evaluate(tmp_path / "d", **{"data.display": "[4,2,0]"})
    assert "PSNR, channel 4" in printed
    assert "PSNR, channel 4" in (tmp_path / "out" / "eval" / "report.html").read_text()
    everywhere.cache(tmp_path / "d")
    assert len(everywhere.cached()) == len(everywhere.evaluated()) == 3
    made = AutoencoderKL.from_pretrained(tmp_path / "out" / "run" / "export")
    assert made.config.in_channels == 5
    bands = everywhere.metrics()["first_stages"][0]["bands"]
    assert [band["channel"] for band in bands] == [0, 1, 2, 3, 4]
    shown = np.asarray(Image.open(tmp_path / "out" / "eval" / "pairs" / "000-original.png"))
    assert shown.shape == (16, 16, 3)
    with pytest.raises(UserError, match=r"data\.channels \[3, 2\] chooses 2"):
        everywhere.evaluate(tmp_path / "d", **{"data.channels": "[3,2]"})
    with pytest.raises(UserError, match=r"data\.display is \[7\]"):
        everywhere.evaluate(tmp_path / "d", **{"data.display": "[7]"})


def test_small_images_are_skipped_and_counted(everywhere, tmp_path):
    put(tmp_path / "d", "a.png", "b.png", "c.png")
    for name in ("d", "e"):
        Image.new("RGB", (30, 12)).save(tmp_path / "d" / f"{name}.png")
    (tmp_path / "d" / "broken.png").write_bytes(b"no")
    fields = {"data.min_side": 16, "data.max_broken": 0.5}
    for command in (everywhere.train, everywhere.cache):
        words = "2 of 6 images are smaller than data.min_side (16)"
        assert words in command(tmp_path / "d", **fields)
    everywhere.evaluate(tmp_path / "d", **{"data.min_side": 16})
    assert everywhere.evaluated() == everywhere.cached() == ["a.png", "b.png", "c.png"]
    refused(everywhere, tmp_path / "d" / "d.png", "all 1 images .* are smaller",
            **{"data.min_side": 16})  # fmt: skip


def test_rectangular_crops(everywhere, tmp_path):
    put(tmp_path / "d", "a.png", "b.png", "c.png")
    everywhere.train(tmp_path / "d", **{"data.crop_shape": "[12,20]", "data.flip": "both"})
    frames = sorted((tmp_path / "out" / "run" / "pictures").glob("step-*.png"))
    width, height = Image.open(frames[0]).size
    assert (width - 4) % 24 == 0
    assert height == 2 * (12 + 4) + 4
    everywhere.evaluate(tmp_path / "d", **{"data.crop_shape": "[12,20]"})
    protocol = everywhere.metrics()["protocol"]
    assert protocol["crop"] == "centre, 20 x 12"
    assert protocol["resize"] == "until the image just covers the crop, bicubic, antialiased"
    everywhere.cache(tmp_path / "d", **{"data.crop_shape": "[12,20]"})
    latents = LatentDataset(everywhere.made)
    assert [tuple(latents[n]["latents"].shape[1:]) for n in range(3)] == [(6, 10)] * 3
    with pytest.raises(UserError, match="beside --buckets auto: give one"):
        everywhere.cache(tmp_path / "d", **{"data.crop_shape": "[12,20]", "buckets": "auto"})
    for shape, words in (("[12,21]", "width"), ("[0,20]", "above 0")):
        with pytest.raises(UserError, match=words):
            everywhere.train(tmp_path / "d", **{"data.crop_shape": shape})
    with pytest.raises(UserError, match="dihedral"):
        everywhere.train(tmp_path / "d", **{"data.crop_shape": "[12,20]", "data.flip": "dihedral"})


def test_figures_are_those_of_each_channel(tmp_path):
    """By hand: an autoencoder that shifts channel k by a known amount."""
    import torch

    from first_stage.metrics.images import BandErrors

    errors, other = BandErrors(), BandErrors()
    images = torch.zeros(3, 2, 4, 4)
    shifted = images.clone()
    shifted[:, 1] += 0.2
    errors.update(images[:1], shifted[:1])
    other.update(images[1:], shifted[1:])
    errors.merge(other)
    none, some = errors.summary()
    assert none == {"psnr": None, "l1": 0.0, "rmse": 0.0}
    assert some["psnr"] == pytest.approx(20)
    assert (some["l1"], some["rmse"]) == (pytest.approx(0.2), pytest.approx(0.1))
