"""The sizes of all images, for buckets: read once, a block at a time, kept until the plan is made.

A launch that is killed while it reads them goes on with the block that it was at.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from first_stage.data import BrokenImage, MachineFault, Reading, Source, picture_size, read_bytes
from first_stage.files import MachineError, write_atomic

FOLDER = "planning"
_BLOCK = 1 << 16
_TOGETHER = 256


def image_sizes(
    folder: Path, source: Source, positions: np.ndarray, ids: pa.Array, workers: int,
    reading: Reading,
) -> np.ndarray:  # fmt: skip
    """Height and width of images as they are seen; 0 where there is none.

    Args:
        folder: The cache, in whose folder `planning` finished blocks are kept.
        source: The images.
        positions: `(N,)`, which, in order.
        ids: Ids of these.
        workers: Threads that read headers.
        reading: How files are read.

    Returns:
        `(N, 2)` int32.
    """
    sizes = np.zeros((len(positions), 2), np.int32)
    with (
        tqdm(total=len(positions), desc="reading sizes", unit=" images") as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        for start in range(0, len(positions), _BLOCK):
            block = slice(start, start + _BLOCK)
            path = folder / FOLDER / f"{_digest(source, reading, ids[block])}.npy"
            if path.exists():
                sizes[block] = np.load(path, allow_pickle=False)
            else:
                sizes[block] = _read(source, positions[block], reading, pool, bar.update)
                write_atomic(path, _saver(sizes[block]))
            bar.update(min(len(positions), start + _BLOCK) - bar.n)
    return sizes


def forget_sizes(folder: Path) -> None:
    """Remove the blocks, once the plan is saved."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _digest(source: Source, reading: Reading, ids: pa.Array) -> str:
    """What names a block: other data, or images read otherwise, have other sizes."""
    digest = hashlib.blake2b(f"{source.name} {reading}\0".encode(), digest_size=16)
    for name in ids.to_pylist():
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def _saver(sizes: np.ndarray) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, sizes, allow_pickle=False)

    return save


def _read(
    source: Source,
    positions: np.ndarray,
    reading: Reading,
    pool: ThreadPoolExecutor,
    done: Callable[[int], Any],
) -> np.ndarray:
    def read(run: np.ndarray) -> np.ndarray:
        return np.array([_size(image, reading) for image in _images(source, run)], np.int32)

    found = []
    for part in pool.map(read, _runs(source, positions)):
        found.append(part)
        done(len(part))
    return np.concatenate(found)


def _size(image: Any, reading: Reading) -> tuple[int, int]:
    size = picture_size(image, reading)
    if size == (0, 0) and isinstance(image, Path) and image.is_file():
        # Damaged, or a machine that fails: that must not decide about the shape.
        try:
            return picture_size(read_bytes(image), reading)
        except MachineFault as error:
            raise MachineError(str(error)) from None
        except BrokenImage:
            pass
    return size


def _runs(source: Source, positions: np.ndarray) -> list[np.ndarray]:
    """Positions that one thread reads together."""
    if hasattr(source, "runs"):  # of rows that lie together
        runs: list[np.ndarray] = source.runs(positions)
        return runs
    return np.split(positions, range(_TOGETHER, len(positions), _TOGETHER))


def _images(source: Source, run: np.ndarray) -> Iterator[Any]:
    if hasattr(source, "images"):
        yield from source.images(run)
    else:
        for position in run.tolist():
            yield source.read(position).image
