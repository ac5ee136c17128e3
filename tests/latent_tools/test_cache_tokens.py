"""Tokens of discrete first stages: cached, read, decoded, exported."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from cache_helpers import cache, make_vae, write_photos

from first_stage.config.schema import ModelConfig
from first_stage.data import images_from_pixels
from first_stage.errors import UserError
from first_stage.models.codebooks import CodebookConfig
from first_stage.models.families import family_named
from first_stage.models.first_stage import FirstStage
from latent_tools import LatentDataset
from latent_tools.export.run import export_cache as export
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest
from latent_tools.format.shards import pack, token_dtype, unpack


def tiny_codes(seed: int = 0, codes: int = 32):
    """A tiny VQModel (f = 2) whose codes are spread over its latents."""
    torch.manual_seed(seed)
    config = ModelConfig(
        family="vq", latent_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, mid_block_attention=False,
    )  # fmt: skip
    object.__setattr__(config, "vq", CodebookConfig(codes=codes))
    model = family_named("vq").build(config, 16).eval()
    with torch.no_grad():
        found = model.encode(torch.rand(8, 3, 16, 16) * 2 - 1).latents.movedim(1, 3).flatten(0, 2)
        model.quantize.embedding.weight.copy_(found[torch.randperm(len(found))[:codes]])
    return model


@pytest.fixture
def made(tmp_path):
    write_photos(tmp_path / "photos", 10)
    model = tiny_codes()
    cache(tmp_path / "photos", tmp_path / "cache", model, representation="tokens", flip=True,
          unit_size=4)  # fmt: skip
    return tmp_path, model


def tokens_of(model, path):
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy())[None]
    with torch.no_grad():
        latents = model.encode(images_from_pixels(pixels)).latents
        return model.quantize(latents)[2][2].view(8, 8)


def test_tokens_are_those_of_the_stock_class(made):
    root, model = made
    data = LatentDataset(root / "cache", sample="tokens", flip=0.0, expect=model)
    assert len(data) == 10
    for index in range(10):
        item = data[index]
        assert item["tokens"].dtype == torch.int64
        assert item["tokens"].shape == (8, 8)
        assert torch.equal(item["tokens"], tokens_of(model, root / "photos" / item["id"]))
        assert "latents" not in item
    manifest = Manifest.load(root / "cache")
    assert manifest.store["dtype"] == "uint16"
    assert manifest.first_stage["codes"] == 32
    flipped = LatentDataset(root / "cache", sample="tokens", flip=1.0)[0]["tokens"]
    assert not torch.equal(flipped, data[0]["tokens"])
    assert not torch.equal(flipped.flip(1), data[0]["tokens"])  # of the mirrored pixels


@torch.no_grad()
def test_tokens_decode_to_reconstructions(made):
    root, model = made
    data = LatentDataset(root / "cache", sample="tokens", flip=0.0)
    (decoded,) = data.decode_preview(data.ids[:1], model)
    quantized = model.quantize.embedding(data[0]["tokens"])[None].movedim(3, 1)
    expected = model.decode(quantized, force_not_quantize=True).sample[0]
    torch.testing.assert_close(decoded, expected)
    stage = FirstStage(model)
    with pytest.raises(UserError, match="do not number the 32 codes"):
        stage.decode_tokens(torch.full((1, 8, 8), 32))
    with pytest.raises(UserError, match="has no codebook"):
        FirstStage(make_vae()).decode_tokens(torch.zeros(1, 8, 8, dtype=torch.int64))


@torch.no_grad()
def test_another_codebook_is_another_first_stage(made):
    root, model = made
    other = tiny_codes()
    other.quantize.embedding.weight.add_(0.1)
    with pytest.raises(CacheError, match="number other codes"):
        LatentDataset(root / "cache", sample="tokens", expect=other)
    with pytest.raises(CacheError, match="codebook: cache"):
        cache(root / "photos", root / "cache", other, representation="tokens", flip=True,
              unit_size=4)  # fmt: skip
    # The latents before quantization do not depend on it.
    cache(root / "photos", root / "latents", model, representation="mean")
    assert LatentDataset(root / "latents", expect=other)[0]["latents"].shape == (3, 8, 8)


def test_what_does_not_fit_is_refused_in_words(made):
    root, model = made
    for sample in ("posterior", "mean"):
        with pytest.raises(CacheError, match="stores tokens: use sample='tokens'"):
            LatentDataset(root / "cache", sample=sample)
    cache(root / "photos", root / "latents", model)
    with pytest.raises(CacheError, match="with --representation tokens"):
        LatentDataset(root / "latents", sample="tokens")
    with pytest.raises(CacheError, match="has no codebook"):
        cache(root / "photos", root / "other", make_vae(), representation="tokens")
    with pytest.raises(CacheError, match="export them as npy, webdataset, datasets"):
        export(root / "cache", "lightningdit", root / "out")


def test_exports_hold_the_tokens(made):
    import datasets

    root, _ = made
    data = LatentDataset(root / "cache", sample="tokens", flip=0.0)
    expected = {item["id"]: item["tokens"].numpy() for item in data}
    export(root / "cache", "npy", root / "npy")
    for name, tokens in expected.items():
        found = np.load((root / "npy" / name).with_suffix(".npy"))
        assert found.dtype == np.uint16
        assert np.array_equal(found, tokens)
    export(root / "cache", "webdataset", root / "wds")
    seen = {}
    for path in sorted((root / "wds").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: io.BytesIO(tar.extractfile(m).read()) for m in tar}
            for name, content in members.items():
                if name.endswith(".json"):
                    about = json.load(content)
                    assert about["codes"] == 32
                    assert "scaling_factor" not in about
                    seen[about["id"]] = np.load(members[name.replace(".json", ".npy")])
    assert all(np.array_equal(seen[name], tokens) for name, tokens in expected.items())
    export(root / "cache", "datasets", root / "ds")
    from datasets import load_dataset

    for table in (
        load_dataset(str(root / "ds"), split="train", cache_dir=str(root / "hf")),
        data.to_datasets(),
    ):
        assert table.features["tokens"] == datasets.Array2D((8, 8), "uint16")
        for row in table:
            assert np.array_equal(row["tokens"], expected[row["id"]])
    assert "number its 32 codes" in (root / "ds" / "README.md").read_text()


@pytest.mark.parametrize(("codes", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_smallest_type_that_holds_the_codes(codes, dtype):
    assert token_dtype(codes) == dtype
    tokens = torch.tensor([0, 1, codes - 1]).view(3, 1, 1, 1).float()
    packed = pack(tokens, dtype, "tokens")["tokens"]
    assert packed.shape == (3, 1, 1)
    assert torch.equal(unpack(packed, None, None)[:, None], tokens)
