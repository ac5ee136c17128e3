"""Folders, tar and parquet files of small pictures."""

import io
import tarfile
from pathlib import Path

import datasets
from conftest import picture


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def put(folder: Path, *names: str) -> Path:
    """Images (or other files) of these names, each another picture."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def put_tar(path: Path, count: int = 3, ending: str = "png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{path.stem}-{number:03d}.{ending}")
            info.size = len(content := png(number))
            tar.addfile(info, io.BytesIO(content))


def put_parquet(path: Path, seeds=(0, 1, 2), **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"image": [{"bytes": png(s), "path": None} for s in seeds], **columns}
    datasets.Dataset.from_dict(values).cast_column("image", datasets.Image()).to_parquet(path)
