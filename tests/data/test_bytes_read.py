"""How many bytes a stream of tar shards fetches: each sample's own, once."""

from pathlib import Path

import fsspec
import pytest
from data_folders import put_tar
from fsspec.spec import AbstractBufferedFile

from first_stage.data import View, fixed_images
from first_stage.data.find_shards import find_shards
from first_stage.data.shard_stream import ShardStream, split_stream
from first_stage.data.shards import ShardedRows, count_rows

SHARDS, ROWS = 4, 48


class Far(fsspec.AbstractFileSystem):
    """Files fetched in blocks, ahead of what is asked for, as those of object stores are."""

    protocol = "far"
    fetched = 0

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("far://")

    def _open(self, path, mode="rb", block_size=None, **options):
        return Block(self, path, mode, block_size or "default", **options)

    def info(self, path, **_):
        place = Path(self._strip_protocol(path))
        kind = "directory" if place.is_dir() else "file"
        return {"name": str(place), "size": place.stat().st_size, "type": kind}

    def ls(self, path, detail=True, **_):
        found = [self.info(str(place)) for place in Path(self._strip_protocol(path)).iterdir()]
        return found if detail else [entry["name"] for entry in found]


class Block(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        content = Path(self.path).read_bytes()[start:end]
        Far.fetched += len(content)
        return content


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards that an address leads to which counts."""
    fsspec.register_implementation("far", Far, clobber=True)
    for number in range(SHARDS):
        put_tar(tmp_path / "shards" / f"{number}.tar", ROWS)
    return tmp_path / "shards"


def test_counting_holding_out_and_an_epoch_read_each_sample_once(tmp_path, folder):
    total = sum(file.stat().st_size for file in folder.iterdir())

    def fetched():
        found, Far.fetched = Far.fetched / total, 0
        return found

    fetched()
    shards = find_shards(f"far://{folder}")
    counted = count_rows(shards, tmp_path)
    assert fetched() <= 1.05
    assert count_rows(shards, tmp_path) == counted
    assert fetched() == 0  # remembered
    training, held_out = split_stream(ShardedRows("far", counted, None), 1 / 4)
    assert len(fixed_images(held_out, View(16, 16), 3, 32, 0)) == 32
    assert fetched() <= 32 / (SHARDS * ROWS)
    stream = ShardStream(training, View(16, 16), 3, 0, slots=8, buffer=32)
    ids = [stream[position].id for position in range(len(training))]
    assert len(set(ids)) == len(training)
    assert fetched() <= 1.05
