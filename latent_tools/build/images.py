"""From samples to batches of pixels: what the decode workers do.

A batch lies inside one unit, and its place there depends on nothing but the batch size, so that the
encoder sees the same batches for any number of processes and workers.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from first_stage.data import (
    BrokenImage,
    MachineFault,
    Reading,
    Source,
    View,
    open_image,
    pixels_of,
    prepare_worker,
    size_of,
)
from first_stage.errors import UserError
from first_stage.files import patiently
from latent_tools.build.unit import SampleRecord
from latent_tools.format.content import content_hash, file_of
from latent_tools.format.files import CacheError
from latent_tools.format.plan import Plan, Shape, Unit

_NOT_THERE = "no longer in the data"


@dataclass(frozen=True)
class Chunk:
    """Some samples of one unit, to be decoded together.

    Attributes:
        unit: The unit's number.
        shape: (height, width) of the pixels.
        ids: Ids of the samples.
        places: Their places in the source; -1 for a sample that is no longer there.
        is_last: Whether it is the unit's last chunk.
    """

    unit: int
    shape: Shape
    ids: list[str]
    places: list[int]
    is_last: bool


@dataclass
class DecodedChunk:
    """A decoded chunk.

    Attributes:
        unit: The unit's number.
        shape: (height, width) of the pixels.
        pixels: `(B, H, W, C)` in 0..255, of the samples that could be decoded; `None` when none
            could.
        records: Those samples.
        failures: Id and reason of the others.
        is_last: Whether it is the unit's last chunk.
        fault: Why the launch cannot go on, if so: what a worker raises would arrive with a whole
            traceback for its message.
    """

    unit: int
    shape: Shape
    pixels: Tensor | None
    records: list[SampleRecord]
    failures: list[tuple[str, str]] = field(default_factory=list)
    is_last: bool = False
    fault: str | None = None

    def pin_memory(self) -> "DecodedChunk":
        """Called by the `DataLoader`'s pinning thread."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        return self


@dataclass(frozen=True)
class Preprocessing:
    """How files become pixels, and which columns travel along.

    Attributes:
        reading: How files are read.
        resolution: Side of the square centre crop.
        resize: Shorter side after resizing; `None` keeps sizes.
        has_buckets: Whether shapes are buckets, which images are resized to just cover.
        columns: The columns to carry.
    """

    reading: Reading
    resolution: int
    resize: int | None
    has_buckets: bool
    columns: tuple[str, ...]

    def view(self, shape: Shape) -> View:
        """The view of a unit's samples."""
        return View(self.resolution, self.resize, shape if self.has_buckets else None)


class ChunkReader(Dataset[DecodedChunk]):
    """Decodes chunks; runs in the decode workers.

    Args:
        source: The samples.
        preprocessing: How.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing):
        self.source, self.preprocessing = source, preprocessing

    def __getitem__(self, chunk: Chunk) -> DecodedChunk:
        """Decode a chunk; a sample that cannot be decoded is listed with its reason."""
        result = DecodedChunk(chunk.unit, chunk.shape, None, [], is_last=chunk.is_last)
        arrays: list[np.ndarray] = []
        for name, place in zip(chunk.ids, chunk.places, strict=True):
            try:
                record, pixels = self.read(name, place, chunk.shape)
            except (MachineFault, UserError) as error:
                result.fault = str(error)
                return result
            except BrokenImage as error:
                result.failures.append((name, str(error)))
                continue
            result.records.append(record)
            arrays.append(pixels)
        if arrays:
            dtype = np.result_type(*arrays)
            stacked = np.stack([a.astype(dtype, copy=False) for a in arrays])
            result.pixels = torch.from_numpy(stacked)
        return result

    def read(self, name: str, place: int, shape: Shape) -> tuple[SampleRecord, np.ndarray]:
        """Decode one sample.

        Args:
            name: Its id.
            place: Its place in the source.
            shape: (height, width) of the pixels.

        Returns:
            Its record and its pixels `(H, W, C)`.

        Raises:
            BrokenImage: When it cannot be decoded, or is not there.
            MachineFault: When the machine fails to read it, several times over.
        """
        if place < 0:
            raise BrokenImage(_NOT_THERE)
        sample = patiently(lambda: self.source.read(place), f"the sample {name!r}")
        file = file_of(sample.image)
        view = self.preprocessing.view(shape)
        image = open_image(file, self.preprocessing.reading, view.scale)
        size = size_of(image)
        image, crop = view.apply(image)
        found = patiently(
            lambda: [sample.columns.get(column) for column in self.preprocessing.columns],
            f"what is said of the sample {name!r}",
        )
        names = self.preprocessing.columns
        columns = {n: plain_value(value, n) for n, value in zip(names, found, strict=True)}
        record = SampleRecord(name, content_hash(file), size, crop, columns)
        return record, pixels_of(image, self.preprocessing.reading)


def plain_value(value: Any, column: str) -> Any:
    """A column's value as a JSON value.

    Raises:
        CacheError: When it cannot be one.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return plain_value(value.tolist(), column)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    if isinstance(value, list | tuple):
        return [plain_value(v, column) for v in value]
    if isinstance(value, dict):
        return {str(k): plain_value(v, column) for k, v in value.items()}
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise CacheError(
        f"the column {column!r} holds {type(value).__name__} values, which a cache cannot carry: "
        "leave it out of columns"
    )


def chunks(
    plan: Plan, units: Sequence[Unit], places: np.ndarray, batch_size: int, lanes: int = 1
) -> Iterator[Chunk]:
    """The units cut into chunks, each unit's in order.

    Args:
        plan: The plan.
        units: The units to do.
        places: Where each planned sample stands in the source, -1 where it does not.
        batch_size: Samples per chunk.
        lanes: How many units are open at a time, taking turns. A `DataLoader` deals its workers
            chunks in turn, so with as many lanes as workers each worker reads whole units, and
            those that lie side by side.
    """
    cuts = [len(units) * lane // lanes for lane in range(lanes + 1)]
    each = [_lane(plan, units[a:b], places, batch_size) for a, b in itertools.pairwise(cuts)]
    while each:
        for lane in list(each):
            chunk = next(lane, None)
            if chunk is None:
                each.remove(lane)
            else:
                yield chunk


def _lane(
    plan: Plan, units: Sequence[Unit], places: np.ndarray, batch_size: int
) -> Iterator[Chunk]:
    for unit in units:
        ids = plan.ids(unit)
        where = places[unit.start : unit.stop].tolist()
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            is_last = start + batch_size >= len(ids)
            yield Chunk(unit.number, unit.shape, ids[part], where[part], is_last)


class _Chunks:
    """The sampler: makes each chunk when it is asked for."""

    def __init__(
        self, plan: Plan, units: Sequence[Unit], places: np.ndarray, batch_size: int, lanes: int
    ):
        self.arguments = (plan, units, places, batch_size, lanes)

    def __iter__(self) -> Iterator[Chunk]:
        return chunks(*self.arguments)

    def __len__(self) -> int:
        _, units, _, batch_size, _ = self.arguments
        return sum(-(-len(unit) // batch_size) for unit in units)


def chunk_loader(
    reader: ChunkReader,
    plan: Plan,
    units: Sequence[Unit],
    places: np.ndarray,
    batch_size: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Decode units in workers, ahead of the encoder and in the plan's order.

    Args:
        reader: Decodes.
        plan: The plan.
        units: The units to do.
        places: Where each planned sample stands in the source.
        batch_size: Samples per chunk.
        workers: Worker processes; 0 decodes in this one.
        pin_memory: Copy pixels to page-locked memory, for a GPU.

    Returns:
        A loader of `DecodedChunk`.
    """
    in_order = getattr(reader.source, "reads_in_order", False)
    lanes = max(1, workers) if in_order else 1
    return DataLoader(
        reader,
        sampler=_Chunks(plan, units, places, batch_size, lanes),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=prepare_worker,
    )
