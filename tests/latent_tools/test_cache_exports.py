"""Exports of a cache: minimal readers written from each format's description read native values.

The cache has flips, two shards and an odd number of samples. The readers below share no code with
the writers.
"""

import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from autoencoders import build_autoencoder
from cache_helpers import ROOT, cache, make_vae, photo, run_tool, write_photos
from safetensors import safe_open

from first_stage.errors import UserError
from latent_tools import CacheError, LatentDataset
from latent_tools.__main__ import main as tool
from latent_tools.export import export_cache
from latent_tools.export.by_sample_name import class_folders, crop_ltrb
from latent_tools.export.cache import relative_path
from latent_tools.export.formats import FORMATS
from latent_tools.export.run import Journal

COUNT = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A cache of 7 photos in two classes: two shards, flips, float16."""
    folder = tmp_path_factory.mktemp("export")
    write_photos(folder / "images", COUNT)
    outcome = cache(folder / "images", folder / "cache", flip=True, unit_size=4)
    assert outcome.is_complete
    assert len(list((folder / "cache/shards").iterdir())) == 2
    return folder


@pytest.fixture
def dataset(made) -> LatentDataset:
    return LatentDataset(made / "cache", sample="raw", normalize="none", flip=0)


def native(dataset: LatentDataset) -> dict[str, dict[str, np.ndarray]]:
    """By id: what the cache itself gives."""
    found = {}
    for place, name in enumerate(dataset.ids):
        item = dataset[place]
        found[name] = {
            "moments": item["latents"].numpy(),
            "moments_flip": dataset.stored(place, flipped=True).numpy(),
            "label": item["label"],
            "size": item["original_size"].tolist(),
        }
    return found


def assert_is_draw(latents: np.ndarray, moments: np.ndarray) -> None:
    """Latents lie around the posterior's mean as far as its spread says, and not on it."""
    mean, logvar = np.split(moments, 2)
    away = (latents - mean) / np.exp(0.5 * logvar)
    assert latents.dtype == np.float32
    assert 0.5 < away.std() < 1.5
    assert np.abs(away).max() < 6


def labels_by_folder(root: Path, suffix: str) -> list[tuple[Path, int]]:
    """As torchvision's DatasetFolder lists files: classes and files sorted by name."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    return [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((root / name).rglob(f"*{suffix}"))
    ]


def test_lightningdit(made, dataset, tmp_path):
    lines = export_cache(made / "cache", "lightningdit", tmp_path / "out")
    assert str(tmp_path / "out") in lines[-1]
    rows, keys = [], ("latents", "latents_flip", "labels")
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            size = shard.get_slice("labels").get_shape()[0]
            for row in range(size):
                rows.append([shard.get_slice(key)[row : row + 1] for key in keys])
    values = native(dataset)
    assert len(rows) == COUNT
    for name, (latents, flipped, label) in zip(dataset.ids, rows, strict=True):
        assert_is_draw(latents[0].numpy(), values[name]["moments"])
        assert_is_draw(flipped[0].numpy(), values[name]["moments_flip"])
        assert label.dtype == torch.int64
        assert label.item() == values[name]["label"]
    stats = torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 4, 1, 1)
    drawn = torch.cat([row[0] for row in rows])
    # A single draw per sample scatters around the statistics over all draws.
    torch.testing.assert_close(drawn.mean((0, 2, 3)), stats["mean"].flatten(), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2, 3)), stats["std"].flatten(), atol=0.1, rtol=0.1)


def test_lightningdit_reads_native_shards_without_a_copy(made, tmp_path):
    cache(made / "images", tmp_path / "cache", flip=True, unit_size=4,
          representation="sample", dtype="float32")  # fmt: skip
    export_cache(tmp_path / "cache", "lightningdit", tmp_path / "out")
    shards = sorted((tmp_path / "cache/shards").iterdir())
    exported = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 2
    assert [f.samefile(s) for f, s in zip(exported, shards, strict=True)] == [True, True]
    with safe_open(exported[0], framework="pt") as shard:
        assert {"latents", "latents_flip", "labels"} <= set(shard.keys())
        assert shard.get_tensor("latents").dtype == torch.float32


def test_mar(made, dataset, tmp_path):
    export_cache(made / "cache", "mar", tmp_path / "out")
    files = labels_by_folder(tmp_path / "out", ".npz")
    values = native(dataset)
    found = {f"{p.parent.name}/{p.name.removesuffix('.npz')}": (p, label) for p, label in files}
    assert set(found) == set(values)
    for name, (file, label) in found.items():
        data = np.load(file)
        for key in ("moments", "moments_flip"):
            assert data[key].dtype == np.float32
            np.testing.assert_array_equal(data[key], values[name][key])
        assert label == values[name]["label"]


def test_fast_dit(made, dataset, tmp_path):
    lines = export_cache(made / "cache", "fast-dit", tmp_path / "out")
    assert any("0.3" in line and "not subtracted" in line for line in lines)
    features = sorted((tmp_path / "out/imagenet256_features").iterdir(), key=lambda p: p.name)
    labels = sorted((tmp_path / "out/imagenet256_labels").iterdir(), key=lambda p: p.name)
    assert [f.name for f in features] == [f.name for f in labels]
    values = native(dataset)
    for name, feature, label in zip(dataset.ids, features, labels, strict=True):
        array, number = np.load(feature), np.load(label)
        assert array.shape == (1, 4, 8, 8)
        assert number.shape == (1,)
        assert number.dtype == np.int64
        assert number[0] == values[name]["label"]
        assert_is_draw(array[0] / np.float32(1.7), values[name]["moments"])


@pytest.mark.parametrize(("form", "folder"), [("edm2", "."), ("repa", "vae-sd")])
def test_edm2_and_repa(made, dataset, tmp_path, form, folder):
    export_cache(made / "cache", form, tmp_path / "out", any_pixel_range=form == "edm2")
    root = tmp_path / "out" / folder
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.npy"))
    assert names[0] == "00000/img-mean-std-00000000.npy"
    described = json.loads((root / "dataset.json").read_text())
    labels = dict(described["labels"])
    assert described["pixel_range"] == [-1, 1]
    assert sorted(labels) == names
    values = native(dataset)
    for sample, name in zip(dataset.ids, names, strict=True):
        array = np.load(root / name)
        mean, logvar = np.split(values[sample]["moments"], 2)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[:4], mean)
        np.testing.assert_allclose(array[4:], np.sqrt(np.exp(logvar)), rtol=1e-6)
        assert labels[name] == values[sample]["label"]


def test_dc_ae(made, dataset, tmp_path):
    export_cache(made / "cache", "dc-ae", tmp_path / "out", draw="mean")
    values = native(dataset)
    files = labels_by_folder(tmp_path / "out", ".npy")
    assert len(files) == COUNT
    for file, label in files:
        value = values[f"{file.parent.name}/{file.stem}.png"]
        array = np.load(file)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, value["moments"][:4] * 1.7, rtol=1e-6)
        assert label == value["label"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_kohya(tmp_path, kind):
    images = tmp_path / "images"
    images.mkdir()
    sizes = {"a.b.png": (40, 24), "c.png": (24, 40), "d.png": (32, 32)}
    for number, (name, size) in enumerate(sizes.items()):
        photo(number, size).save(images / name)
    torch.manual_seed(0)
    vae = build_autoencoder(3, 4, (8, 8, 8, 8), 1, 4, False, True, 32).eval()
    cache(images, tmp_path / "cache", vae, flip=True, buckets="24x40,40x24,32x32", resolution=32)
    export_cache(tmp_path / "cache", f"kohya-{kind}", images, draw="mean")
    dataset = LatentDataset(tmp_path / "cache", sample="raw", normalize="none", flip=0)
    for name, (width, height) in sizes.items():
        stem = name.removesuffix(".png")
        data = np.load(images / f"{stem}_{width:04d}x{height:04d}_{kind}.npz")
        place = dataset.index_of(name)
        np.testing.assert_array_equal(data["latents"], dataset.stored(place).numpy()[:4])
        np.testing.assert_array_equal(
            data["latents_flipped"], dataset.stored(place, flipped=True).numpy()[:4]
        )
        assert data["latents"].shape == (4, height // 8, width // 8)
        assert data["original_size"].tolist() == [width, height]
        assert data["crop_ltrb"].tolist() == [0, 0, width, height]


def test_webdataset(made, dataset, tmp_path):
    export_cache(made / "cache", "webdataset", tmp_path / "out", draw="mean")
    values = native(dataset)
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")  # the key ends at the first dot
                content = tar.extractfile(member).read()
                samples.setdefault(f"{folder}/{key}", {})[extension] = content
    assert len(samples) == COUNT
    order = []
    for sample in samples.values():
        (tmp_path / "a.npy").write_bytes(sample["npy"])
        array, about = np.load(tmp_path / "a.npy"), json.loads(sample["json"])
        value = values[about["id"]]
        order.append(about["id"])
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, value["moments"][:4] * 1.7, rtol=1e-3, atol=1e-3)
        assert about["label"] == value["label"]
        assert [about["height"], about["width"]] == value["size"]
    assert order == dataset.ids


def test_datasets(made, dataset, tmp_path):
    import datasets

    export_cache(made / "cache", "datasets", tmp_path / "out")
    loaded = datasets.load_dataset(
        str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert loaded.features["moments"] == datasets.Array3D((8, 8, 8), "float16")
    values = native(dataset)
    assert loaded["id"][:] == dataset.ids
    for row in loaded.with_format("numpy"):
        value = values[str(row["id"])]
        for key in ("moments", "moments_flip"):
            np.testing.assert_array_equal(row[key].astype(np.float32), value[key])
        assert row["label"] == value["label"]
        assert row["original_size"].tolist() == value["size"]
    assert "scaling_factor: 1.7" in (tmp_path / "out/README.md").read_text()


def test_shapes_become_configurations_of_the_data_set(tmp_path):
    import datasets

    (tmp_path / "images").mkdir()
    for number, size in enumerate([(24, 16)] * 3 + [(16, 24)] * 2):
        photo(number, size).save(tmp_path / f"images/{number}.png")
    cache(tmp_path / "images", tmp_path / "cache", buckets="16x24,24x16")
    export_cache(tmp_path / "cache", "datasets", tmp_path / "out")
    sizes = {}
    for name in ("16x24", "24x16"):
        loaded = datasets.load_dataset(
            str(tmp_path / "out"), name, split="train", cache_dir=str(tmp_path / "hf")
        )
        sizes[name] = (len(loaded), loaded.features["moments"].shape)
    assert sizes == {"16x24": (3, (8, 8, 12)), "24x16": (2, (8, 12, 8))}


def test_draws_depend_on_seed_and_id_alone(made, tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        export_cache(made / "cache", "fast-dit", tmp_path / str(number), seed=seed)
    one, same, other = (
        np.load(sorted((tmp_path / str(n) / "imagenet256_features").iterdir())[-1])
        for n in range(3)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"kohya-sd", "kohya-sdxl"}))
def test_a_stopped_export_goes_on_and_ends_with_the_same_bytes(made, tmp_path, monkeypatch, form):
    """Stopped after the first unit; the second launch writes only the other one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    export_cache(made / "cache", form, whole, any_pixel_range=True)
    add = Journal.add

    def add_and_stop(journal: Journal, unit: int, samples: int) -> None:
        add(journal, unit, samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        export_cache(made / "cache", form, stopped, any_pixel_range=True)
    added = []

    def add_and_note(journal: Journal, unit: int, samples: int) -> None:
        add(journal, unit, samples)
        added.append(unit)

    monkeypatch.setattr(Journal, "add", add_and_note)
    export_cache(made / "cache", form, stopped, any_pixel_range=True)
    assert added == [1]
    assert contents(stopped) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("lightningdit", ["flipped", "--flip true"]),
        ("mar", ["flipped", "--flip true"]),
        ("edm2", ["[0, 1]", "[-1, 1]", "--any_pixel_range true"]),
        ("kohya-sd", ["factor 8", "factor 2"]),
    ],
)
def test_what_the_cache_cannot_give_is_refused_in_words(tmp_path, form, words):
    write_photos(tmp_path / "images", 2)
    cache(tmp_path / "images", tmp_path / "cache")
    with pytest.raises(CacheError) as caught:
        export_cache(tmp_path / "cache", form, tmp_path / "out")
    for word in [form.split("-")[0], *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_labels_posterior_and_square_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        photo(number, (24, 16)).save(tmp_path / f"images/{number}.png")
    cache(tmp_path / "images", tmp_path / "cache", flip=True, representation="mean",
          buckets="16x24,24x16")  # fmt: skip
    for form, word in (
        ("mar", "moments"),
        ("fast-dit", "label"),
        ("lightningdit", "label"),
    ):
        with pytest.raises(CacheError, match=word):
            export_cache(tmp_path / "cache", form, tmp_path / "out")
    with pytest.raises(CacheError, match="stores each posterior's mean alone"):
        export_cache(tmp_path / "cache", "webdataset", tmp_path / "out", draw="posterior")
    write_photos(tmp_path / "labelled", 2)
    cache(tmp_path / "labelled", tmp_path / "wide", buckets="16x24")
    with pytest.raises(CacheError, match="16x24"):
        export_cache(tmp_path / "wide", "fast-dit", tmp_path / "out")


def test_names_that_differ_only_in_their_extension_are_refused_where_they_would_meet(tmp_path):
    for name in ("a/cat.jpg", "a/cat.png", "b/cat.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(len(name)).save(tmp_path / "images" / name)
    cache(tmp_path / "images", tmp_path / "cache", flip=True)
    with pytest.raises(CacheError, match=r"a/cat\.jpg.*a/cat\.png"):
        export_cache(tmp_path / "cache", "dc-ae", tmp_path / "dc")
    export_cache(tmp_path / "cache", "mar", tmp_path / "mar")
    assert len(list((tmp_path / "mar").rglob("*.npz"))) == 3


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a\\b.png", "a/../../b.png", ""])
def test_ids_that_lead_out_of_the_folder_are_refused(name):
    with pytest.raises(CacheError, match="below the output folder"):
        relative_path(name)


def test_a_folder_with_something_else_is_left_alone(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"thesis\.txt"):
        export_cache(made / "cache", "fast-dit", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_export_of_another_encoder_is_not_mixed_in(made, tmp_path):
    export_cache(made / "cache", "fast-dit", tmp_path / "out")
    cache(made / "images", tmp_path / "other", make_vae(1), flip=True, unit_size=4)
    with pytest.raises(CacheError, match="encoder_sha256"):
        export_cache(tmp_path / "other", "fast-dit", tmp_path / "out")
    with pytest.raises(CacheError, match="seed"):
        export_cache(made / "cache", "fast-dit", tmp_path / "out", seed=5)


def test_the_command(made, tmp_path):
    line = ["export", str(made / "cache"), "--format", "repa", "--output", str(tmp_path / "out")]
    result = run_tool(*line)
    assert result.returncode == 0, result.stderr
    assert "7 samples as repa" in result.stdout
    assert str(tmp_path / "out") in result.stdout.splitlines()[-1]
    assert "exporting repa" in result.stderr  # the progress bar
    assert len(list((tmp_path / "out/vae-sd").rglob("*.npy"))) == COUNT
    wrong = run_tool(*line[:2], "--format", "edm2", "--output", str(tmp_path / "no"))
    assert wrong.returncode == 2
    assert wrong.stderr.strip().count("\n") == 0
    assert "--any_pixel_range" in wrong.stderr


@pytest.mark.parametrize(
    ("bucket", "image", "expected"),
    [
        ((512, 512), (1000, 1000), (0, 0, 512, 512)),
        ((512, 512), (1000, 500), (0, 128, 512, 384)),
        ((512, 512), (500, 1000), (128, 0, 384, 512)),
        ((768, 512), (600, 600), (128, 0, 640, 512)),
    ],
)
def test_crop_as_kohyas_scripts_count_it(bucket, image, expected):
    assert crop_ltrb(bucket, image) == expected


def test_class_folders_sort_as_the_labels_do():
    def folders(labels, classes):
        index = pa.table({"class": classes} if classes else {"id": ["x"] * len(labels)})
        return class_folders(SimpleNamespace(labels=np.array(labels), index=index))

    assert folders([1, 0], ["b", "a"]) == {0: "a", 1: "b"}
    # Sorted by name, b would be class 0 for the reader and a class 1: use the labels.
    assert folders([1, 0], ["a", "b"]) == {0: "00000", 1: "00001"}
    assert folders([10, 9], None) == {9: "00009", 10: "00010"}
    assert folders([0, 1], ["..", "b"]) == {0: "00000", 1: "00001"}
    assert folders([0, 0, 1], ["a", "b", "c"]) == {0: "00000", 1: "00001"}


def test_an_export_grows_with_its_cache(tmp_path):
    write_photos(tmp_path / "images", 3)
    cache(tmp_path / "images", tmp_path / "cache", flip=True)
    for form in ("mar", "repa"):
        export_cache(tmp_path / "cache", form, tmp_path / form)
    write_photos(tmp_path / "images", 5)
    cache(tmp_path / "images", tmp_path / "cache", flip=True)
    export_cache(tmp_path / "cache", "mar", tmp_path / "mar")
    export_cache(tmp_path / "cache", "mar", tmp_path / "mar-fresh")
    assert contents(tmp_path / "mar") == contents(tmp_path / "mar-fresh")
    with pytest.raises(UserError, match="numbers them in the order of their names"):
        export_cache(tmp_path / "cache", "repa", tmp_path / "repa")
    assert len(list((tmp_path / "mar").rglob("*.npz"))) == 5


def test_npy_gives_an_array_a_sample_without_labels(tmp_path):
    """As the table of the page says; test_cache_tokens has tokens."""
    for name in ("a.png", "deeper/b.png"):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(len(name)).save(tmp_path / "flat" / name)
    cache(tmp_path / "flat", tmp_path / "cache", representation="mean")
    export_cache(tmp_path / "cache", "npy", tmp_path / "npy")
    dataset = LatentDataset(tmp_path / "cache", normalize="none")
    assert sorted(dataset.ids) == ["a.png", "deeper/b.png"]
    for place, name in enumerate(dataset.ids):
        found = np.load((tmp_path / "npy" / name).with_suffix(".npy"))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, dataset[place]["latents"].numpy())


def test_the_page_has_a_row_for_every_format():
    page = (ROOT / "docs/guides/other-trainers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(["--format", *FORMATS])


def test_export_without_a_format_lists_every_one():
    with pytest.raises(UserError) as caught:
        tool(["export", "x"])
    assert all(name in str(caught.value) for name in FORMATS)


def test_an_unknown_format_is_answered_in_one_line_with_the_formats(tmp_path):
    with pytest.raises(CacheError) as caught:
        tool(["export", "x", "--format", "edm", "--output", str(tmp_path / "o")])
    assert str(caught.value).startswith("format is 'edm'; it can be lightningdit, mar")
    assert "\n" not in str(caught.value)
