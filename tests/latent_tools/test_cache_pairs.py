"""Other programs pair latents with the right images: from a fresh cache, and from one that grew,
lost and changed samples. Each reader is written from what its project's loader does.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import build_autoencoder
from cache_helpers import cache, make_vae, photo
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from first_stage.data import Reading, View, images_from_pixels, open_image, pixels_of
from first_stage.errors import UserError
from latent_tools import BucketBatchSampler, LatentDataset, collate
from latent_tools.export.run import export_cache
from latent_tools.format.plan import kohya_bucket, kohya_buckets

VAE = make_vae()


def encoded(path: Path, vae=VAE, shape=(16, 16), reading: Reading | int = 3) -> torch.Tensor:
    """What an image's latents should be: the posterior's mean."""
    seen, _ = View(16, 16, shape).apply(open_image(path, reading))
    pixels = torch.from_numpy(pixels_of(seen, 3))[None]
    with torch.no_grad():
        return vae.encode(images_from_pixels(pixels)).latent_dist.mean[0]


def put(folder: Path, name: str, seed: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    photo(seed).save(folder / name)


@pytest.fixture(scope="module", params=["fresh", "followed"])
def made(request, tmp_path_factory):
    """Images in two classes, and their cache: made at once, or after all kinds of changes."""
    root = tmp_path_factory.mktemp(request.param)
    names = [f"{'ab'[n % 2]}/{n:03d}.png" for n in range(11)]
    options = {"flip": True, "unit_size": 4}
    if request.param == "followed":
        for seed, name in enumerate(names[3:]):
            put(root / "images", name, seed + 50)
        put(root / "images", "b/zzz.png", 9)
        cache(root / "images", root / "cache", VAE, **options)
        (root / "images/b/zzz.png").unlink()
        shutil.rmtree(root / "images")
    for seed, name in enumerate(names):
        put(root / "images", name, seed)
    cache(root / "images", root / "cache", VAE, update=True, **options)
    return root


def check(found: torch.Tensor | np.ndarray, image: Path, scale: float = 1.0) -> None:
    found = torch.as_tensor(np.asarray(found)).reshape(-1, 8, 8)[:4]
    torch.testing.assert_close(found / scale, encoded(image), atol=5e-3, rtol=0)


def images_sorted(root: Path) -> list[Path]:
    return sorted((root / "images").rglob("*.png"))


def label_of(image: Path) -> int:
    return "ab".index(image.parent.name)


def nearest(root: Path, latents) -> Path:
    """The image that latents are of."""
    found = torch.as_tensor(np.asarray(latents)).reshape(-1, 8, 8)[:4]
    return min(images_sorted(root), key=lambda p: float((encoded(p) - found).abs().max()))


def test_repa(made, tmp_path):
    """Sorted picture names beside sorted feature names, paired by place."""
    export_cache(made / "cache", "repa", tmp_path / "out")
    features = tmp_path / "out" / "vae-sd"
    names = sorted(
        os.path.relpath(os.path.join(folder, file), features)
        for folder, _, files in os.walk(features)
        for file in files
        if file.endswith(".npy")
    )
    labels = dict(json.loads((features / "dataset.json").read_text())["labels"])
    assert len(names) == len(images_sorted(made)) == 11
    for image, name in zip(images_sorted(made), names, strict=True):
        check(np.load(features / name), image)
        assert labels[name] == label_of(image)


def test_edm2(made, tmp_path):
    """Names and labels of dataset.json."""
    export_cache(made / "cache", "edm2", tmp_path / "out", any_pixel_range=True)
    labels = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    assert len(labels) == 11
    for name, label in labels:
        latents = np.load(tmp_path / "out" / name)
        image = nearest(made, latents)
        check(latents, image)
        assert label == label_of(image)


def test_fast_dit(made, tmp_path):
    """Two folders, each sorted as text, paired by place."""
    export_cache(made / "cache", "fast-dit", tmp_path / "out", draw="mean")
    features, labels = (
        sorted((tmp_path / "out" / f"imagenet256_{what}").iterdir(), key=lambda p: p.name)
        for what in ("features", "labels")
    )
    for feature, label in zip(features, labels, strict=True):
        latents = np.load(feature)
        image = nearest(made, latents / 1.7)
        check(latents, image, scale=1.7)
        assert np.load(label).item() == label_of(image)


def test_mar(made, tmp_path):
    """Class folders sorted; the image's full name with .npz behind it."""
    export_cache(made / "cache", "mar", tmp_path / "out")
    classes = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    for image in images_sorted(made):
        file = tmp_path / "out" / image.parent.name / f"{image.name}.npz"
        check(np.load(file)["moments"], image)
        assert classes.index(file.parent.name) == label_of(image)
    assert len(list((tmp_path / "out").rglob("*.npz"))) == 11


def test_lightningdit(made, tmp_path):
    """Every safetensors file, sorted; rows of latents and labels."""
    export_cache(made / "cache", "lightningdit", tmp_path / "out", draw="mean")
    count = 0
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(file)
        for latents, label in zip(tensors["latents"], tensors["labels"], strict=True):
            image = nearest(made, latents)
            check(latents, image)
            assert int(label) == label_of(image)
            count += 1
    assert count == 11


def test_kohya_reads_its_own_rule_and_never_loses_files(tmp_path):
    """With its buckets and its upright-free reading; a user's own file is not written over."""
    folder = tmp_path / "images"
    folder.mkdir()
    torch.manual_seed(0)
    vae = build_autoencoder(3, 4, (8, 8, 8, 8), 1, 4, False, True, 64).eval()
    photo(0, (640, 480)).save(folder / "wide.png")
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    photo(1, (480, 640)).save(folder / "turned.jpg", exif=exif, quality=95)
    reading = Reading(3, upright=False)
    cache(folder, tmp_path / "c", vae, buckets="kohya", resolution=320, reading=reading)
    export_cache(tmp_path / "c", "kohya-sd", folder, draw="mean")
    for name, size in (("wide.png", (640, 480)), ("turned.jpg", (480, 640))):
        # The scripts take the size as it is stored, choose the bucket, and look for this file.
        height, width = kohya_bucket(np.array([size[::-1]]), kohya_buckets(320, 8))[0].tolist()
        stem = name.rsplit(".", 1)[0]
        arrays = np.load(folder / f"{stem}_{size[0]:04d}x{size[1]:04d}_sd.npz")
        assert arrays["latents"].shape == (4, height // 8, width // 8)
        assert arrays["original_size"].tolist() == list(size)
        expected = encoded(folder / name, vae, (height, width), reading)
        found = torch.from_numpy(arrays["latents"])
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    export_cache(
        tmp_path / "c", "kohya-sd", folder, draw="mean"
    )  # its own files may be written over
    (folder / "kohya-sd.export.json").unlink()
    mine = folder / "wide_0640x0480_sd.npz"
    np.savez(mine, latents=np.zeros((4, 2, 2)))
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"wide_0640x0480_sd\.npz' is there already and was not"):
        export_cache(tmp_path / "c", "kohya-sd", folder, draw="mean")
    assert mine.read_bytes() == before


def test_kohyas_buckets_by_hand():
    """Its rule at 512, as its documentation lists it, and how it chooses."""
    shapes = kohya_buckets(512, 8)
    assert (512, 512) in shapes
    assert (768, 320) in shapes
    assert (256, 1024) in shapes
    assert all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 for h, w in shapes)
    assert shapes == sorted(shapes, key=lambda shape: (shape[1], shape[0]))
    sizes = np.array([[1000, 1000], [480, 640], [320, 768], [4000, 100], [0, 0]])
    assert kohya_bucket(sizes, shapes).tolist() == [
        [512, 512], [448, 576], [320, 768], [1024, 256], [512, 512],
    ]  # fmt: skip
    with pytest.raises(UserError, match="does not divide"):
        kohya_buckets(512, 48)


def test_a_sampler_drops_nothing_unasked(made):
    dataset = LatentDataset(made / "cache")
    assert len(dataset) == 11
    batches = list(BucketBatchSampler(dataset, 8, rank=0, world=1))
    assert sorted(i for batch in batches for i in batch) == list(range(11))
    assert len(list(BucketBatchSampler(dataset, 8, rank=0, world=1, drop_last=True))) == 1


def test_collate_takes_captions_that_are_missing_and_lists(made):
    dataset = LatentDataset(made / "cache", sample="mean")
    loader = DataLoader(
        dataset, batch_sampler=BucketBatchSampler(dataset, 4, rank=0, world=1), collate_fn=collate
    )
    batch = next(iter(loader))
    assert batch["latents"].shape == (4, 4, 8, 8)
    assert batch["label"].dtype == torch.int64
    assert all(isinstance(name, str) for name in batch["id"])
    mixed = [{"caption": None, "tags": ["a", "b"], "score": 1.5},
             {"caption": "x", "tags": ["c"], "score": 2.0}]  # fmt: skip
    assert collate(mixed)["caption"] == [None, "x"]
    assert collate(mixed)["tags"] == [["a", "b"], ["c"]]
    assert collate(mixed)["score"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_kohyas_rule_over_1260_sizes(resolution):
    """Against its rule, written down again: the first bucket, by width and then height, whose ratio
    of width to height is nearest; an image of a bucket's own size takes that one."""
    pairs = set()
    for width in range(256, 1024 + 1, 64):
        height = min(1024, resolution * resolution // width // 64 * 64)
        if height >= 256:
            pairs |= {(width, height), (height, width)}
    pairs.add((resolution, resolution))

    def chosen(width, height):
        if (width, height) in pairs:
            return [height, width]
        near = min(sorted(pairs), key=lambda pair: abs(pair[0] / pair[1] - width / height))
        return [near[1], near[0]]

    sides = [(w, h) for w in range(300, 2600, 64) for h in range(300, 2500, 63)]
    assert len(sides) == 36 * 35 == 1260
    sizes = np.array([(h, w) for w, h in sides + sorted(pairs)])
    found = kohya_bucket(sizes, kohya_buckets(resolution, 8)).tolist()
    assert found == [chosen(w, h) for h, w in sizes.tolist()]
