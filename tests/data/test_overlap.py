"""Held-out images that are trained on are refused, wherever they lie, at a bounded cost."""

import io
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from data_folders import png, put, put_parquet, put_tar

from first_stage.data import SubsetSource, open_source, overlap
from first_stage.data.files import read_bytes
from first_stage.data.find_shards import find_shards
from first_stage.data.overlap import refuse_shared
from first_stage.data.shards import RowSource, ShardedRows, count_rows
from first_stage.errors import DataError


def folder(path: Path, seeds):
    path.mkdir(parents=True)
    for seed in seeds:
        (path / f"p{seed}.png").write_bytes(png(seed))
    return open_source(str(path))


def tar(path: Path, seeds):
    path.mkdir(parents=True)
    with tarfile.open(path / "a.tar", "w") as archive:
        for seed in seeds:
            for ending, content in (("json", b"{}"), ("png", png(seed))):
                info = tarfile.TarInfo(f"p{seed}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return open_source(str(path))


def parquet(path: Path, seeds):
    put_parquet(path / "a.parquet", seeds)
    return open_source(str(path))


def streamed(path: Path, seeds):
    put_parquet(path / "a.parquet", seeds)
    return RowSource(ShardedRows(str(path), count_rows(find_shards(str(path))), None))


def subset(path: Path, seeds):
    return SubsetSource(tar(path, [1000, *seeds]), 1 + np.arange(len(seeds)))


KINDS = [folder, tar, parquet, streamed, subset]


@pytest.mark.parametrize("held_out", KINDS)
@pytest.mark.parametrize("training", KINDS)
def test_the_same_content_is_found_across_all_kinds(tmp_path, training, held_out):
    trained, held = training(tmp_path / "a", range(8)), held_out(tmp_path / "b", range(20, 28))
    refuse_shared(trained, held)
    held = held_out(tmp_path / "c", [*range(20, 28), 5])
    with pytest.raises(DataError, match="the same content"):
        refuse_shared(trained, held)


@pytest.mark.parametrize("kind", [folder, tar, parquet])
def test_few_of_many_are_read(tmp_path, kind):
    """Where sizes are known, all samples are compared by them, and a few are read."""
    trained = kind(tmp_path / "a", range(300))
    held = kind(tmp_path / "b", range(400, 403))
    seen = []
    read = type(trained).read
    with mock.patch.object(type(trained), "read", lambda s, i: seen.append(i) or read(s, i)):
        refuse_shared(trained, held)
    assert len(seen) < 150
    with pytest.raises(DataError, match=r"#?p?.*is trained on too"):
        refuse_shared(trained, kind(tmp_path / "c", [900, 299]))


@pytest.mark.parametrize("kind", [folder, tar, parquet, streamed])
def test_no_more_are_read_than_is_stated(tmp_path, kind, monkeypatch):
    """Images of one size, as arrays are, are all alike."""
    monkeypatch.setattr(overlap, "_READ", 16)
    monkeypatch.setattr(overlap, "_HELD_OUT_READ", 4)
    monkeypatch.setattr(overlap, "_RUNS", 2)
    trained, held = kind(tmp_path / "a", range(60)), kind(tmp_path / "b", range(60, 80))
    if kind is not streamed:
        same = mock.patch.object(type(trained), "image_sizes", lambda _, places: places * 0 + 7)
        content = overlap._content
        with (
            same,
            mock.patch.object(
                overlap, "_content", side_effect=lambda *given: (7, content(*given)[1])
            ) as looked,
        ):
            refuse_shared(trained, held)
    else:
        with mock.patch.object(overlap, "_content", side_effect=overlap._content) as looked:
            refuse_shared(trained, held)
    assert looked.call_count == 20


def test_the_same_file_and_the_same_shard(tmp_path):
    put(tmp_path, "a/0.png", "a/1.png", "a/2.png")
    put(tmp_path / "b", "9.png")
    with pytest.raises(DataError, match=r"b/9\.png .*the same file"):
        refuse_shared(open_source(str(tmp_path)), open_source(str(tmp_path / "b")))
    for write, ending in ((put_tar, "tar"), (put_parquet, "parquet")):
        write(tmp_path / ending / f"train.{ending}")
        write(tmp_path / ending / f"more.{ending}")
        (tmp_path / f"link.{ending}").symlink_to(tmp_path / ending / f"more.{ending}")
        training = open_source(f"{tmp_path}/{ending}/*.{ending}")
        held_out = open_source(str(tmp_path / f"link.{ending}"))
        with pytest.raises(DataError, match=rf"as more\.{ending} .*the same file"):
            refuse_shared(training, held_out)


def test_splits_of_one_folder_of_shards_are_compared_by_content(tmp_path):
    put_parquet(tmp_path / "train-0.parquet", range(6))
    put_parquet(tmp_path / "validation-0.parquet", [7, 3])
    training = open_source(str(tmp_path), hub_split="train")
    held_out = open_source(str(tmp_path), hub_split="validation")
    with pytest.raises(DataError, match=r"validation-0\.parquet#000000001 .*the same content"):
        refuse_shared(training, held_out)


def test_sizes_are_those_of_the_images(tmp_path):
    for number, kind in enumerate((folder, tar, parquet, subset)):
        source = kind(tmp_path / str(number), range(5))
        places = np.array([3, 0, 4])
        images = [source.read(int(place)).image for place in places]
        sizes = [len(read_bytes(i) if isinstance(i, Path) else i) for i in images]
        assert source.image_sizes(places).tolist() == sizes
