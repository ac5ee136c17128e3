"""Helpers of `test_shard_stream.py` that other tests share."""

import io
import itertools
import tarfile
from pathlib import Path

import datasets
import pytest
from conftest import picture

ROWS = (5, 11, 1, 8, 12)


TOTAL = sum(ROWS)


KINDS = ["parquet", "tar"]


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed, 10, 10).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, kind: str, rows=ROWS, broken=()) -> Path:
    folder.mkdir(exist_ok=True)
    seeds = iter(range(sum(rows)))
    for number, count in enumerate(rows):
        contents = [(s, b"broken" if s in broken else encoded(s)) for s in
                    itertools.islice(seeds, count)]  # fmt: skip
        path = folder / f"shard-{number:03d}.{kind}"
        if kind == "parquet":
            table = datasets.Dataset.from_dict(
                {
                    "label": [seed for seed, _ in contents],
                    "image": [{"bytes": data, "path": None} for _, data in contents],
                }
            ).cast_column("image", datasets.Image())
            table.to_parquet(path, batch_size=4)  # several row groups in a file
            continue
        with tarfile.open(path, "w") as tar:
            for seed, data in contents:
                for ending, content in (("json", b'{"a": 1}'), ("png", data)):
                    info = tarfile.TarInfo(f"folder/key{seed:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / request.param, request.param)
