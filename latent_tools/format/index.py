"""The index: what stands where in a finished cache, and what is known of each sample.

`index.parquet` is for people and other programs. `index.arrow` and `units.arrow` hold the same
uncompressed, so that readers map them: nothing is loaded, a row costs the same at any number of
samples, and all workers and processes of a machine share the pages.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from first_stage.files import patiently
from latent_tools.format.files import CacheError

INDEX, FAILURES = "index.parquet", "failures.parquet"
SAMPLES, UNITS = "index.arrow", "units.arrow"

_SHIFT = 18
ROWS = 1 << _SHIFT
"""Rows of every record batch but the last, so that a row's batch is a shift away."""

PLACES = ("unit", "row", "shard", "height", "width", "content")
"""Of `index.parquet`, what places a sample in the cache."""
SIZES = ("original_height", "original_width", "crop_top", "crop_left")
SIZE = "size"
"""In `index.arrow`, the four `SIZES` as one column."""


@dataclass(frozen=True)
class UnitTable:
    """The units that have samples, in order; a unit's samples lie side by side.

    Attributes:
        numbers: `(U,)`, their numbers.
        starts: `(U + 1,)`, first row of each, and the number of samples.
        shapes: `(U, 2)`, height and width of the pixels.
        shards: File names.
    """

    numbers: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray
    shards: list[str]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Which of the units each row is in."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def to_table(self) -> pa.Table:
        """As `units.arrow` holds it."""
        columns = {
            "unit": self.numbers, "start": self.starts[:-1], "count": np.diff(self.starts),
            "height": self.shapes[:, 0], "width": self.shapes[:, 1],
        }  # fmt: skip
        arrays = {name: pa.array(values, pa.int64()) for name, values in columns.items()}
        return pa.table({**arrays, "shard": pa.array(self.shards, pa.string())})

    @staticmethod
    def of_table(table: pa.Table) -> "UnitTable":
        """What `to_table` gave."""
        number, start, count, height, width = (
            table[name].to_numpy() for name in ("unit", "start", "count", "height", "width")
        )
        starts = np.concatenate([start, [int(count.sum())]]).astype(np.int64)
        return UnitTable(number, starts, np.stack([height, width], 1), table["shard"].to_pylist())


class Index:
    """A finished cache's index, mapped.

    It can be pickled: another process maps the files anew.

    Args:
        folder: The cache.

    Raises:
        CacheError: When the cache is not finished, or the index cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / INDEX).exists():
            raise CacheError(
                f"the cache {str(folder)!r} is not finished (it has no {INDEX}): start the command "
                "that makes it again; it goes on where it stopped"
            )
        self._open()

    def _open(self) -> None:
        try:
            rows = patiently(lambda: pq.read_metadata(self.folder / INDEX).num_rows, INDEX)
            batches = self._mapped(rows)
            if batches is None:  # of an older release, or written over by one
                units, batches = _from_parquet(self.folder / INDEX)
            else:
                with pa.memory_map(str(self.folder / UNITS)) as file:
                    units = UnitTable.of_table(pa.ipc.open_file(file).read_all())
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CacheError(
                f"the index of {str(self.folder)!r} cannot be read ({reason}): delete its "
                f"{INDEX} and start the command that makes the cache again; it writes the index "
                "anew"
            ) from error
        self.units, self._rows = units, rows
        names = batches[0].schema.names if batches else ["id", SIZE]
        self._arrays = {name: [batch.column(name) for batch in batches] for name in names}
        self._values = {name: [_reader(a) for a in arrays] for name, arrays in self._arrays.items()}
        self._sizes = [
            array.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(SIZES))
            for array in self._arrays.get(SIZE, [])
        ]
        self.column_names = [name for name in names if name not in ("id", SIZE)]

    def _mapped(self, rows: int) -> list[pa.RecordBatch] | None:
        if not ((self.folder / SAMPLES).exists() and (self.folder / UNITS).exists()):
            return None
        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / SAMPLES)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return batches if sum(batch.num_rows for batch in batches) == rows else None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def __len__(self) -> int:
        return self._rows

    def values(self, name: str, rows: Iterable[int]) -> list[Any]:
        """A column's values, as Python has them: the time does not depend on the column's length.

        Args:
            name: `id`, or a carried column.
            rows: Which.
        """
        values = self._values[name]
        return [values[row >> _SHIFT](row & (ROWS - 1)) for row in rows]

    def sizes(self, rows: Sequence[int]) -> np.ndarray:
        """`(N, 4)` int64: original height and width, and the crop's top and left."""
        sizes = np.empty((len(rows), len(SIZES)), np.int64)
        for place, row in enumerate(rows):
            sizes[place] = self._sizes[row >> _SHIFT][row & (ROWS - 1)]
        return sizes

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, mapped."""
        return pa.chunked_array(self._arrays[name]) if self._arrays[name] else pa.chunked_array(
            [], pa.large_string()
        )  # fmt: skip

    @property
    def schema(self) -> pa.Schema:
        """Of the carried columns, with text of the usual type."""
        kinds = {name: self.column(name).type for name in self.column_names}
        return pa.schema(
            [
                (name, pa.string() if pa.types.is_large_string(kind) else kind)
                for name, kind in kinds.items()
            ]
        )

    def find(self, name: str) -> int:
        """The row of an id, by looking through all; -1 when it is not there."""
        for number, array in enumerate(self._arrays["id"]):
            place = pc.index(array, pa.scalar(name, array.type)).as_py()
            if place >= 0:
                return (number << _SHIFT) + int(place)
        return -1


def _reader(array: pa.Array) -> Callable[[int], Any]:
    """What gives an array's values: text and whole numbers straight from the mapped bytes."""
    has_holes = array.null_count > 0 or array.offset > 0
    if not has_holes and pa.types.is_large_string(array.type):
        starts = memoryview(array.buffers()[1]).cast("q")
        data = memoryview(array.buffers()[2] or b"")
        return lambda row: str(data[starts[row] : starts[row + 1]], "utf8")
    if not has_holes and pa.types.is_int64(array.type):
        return memoryview(array.buffers()[1]).cast("q").__getitem__
    return lambda row: array[row].as_py()


def samples_of(table: pa.Table) -> pa.Table:
    """Rows of `index.parquet` as `index.arrow` holds them."""
    sizes = np.stack([table[name].to_numpy() for name in SIZES], axis=1).astype(np.int32)
    columns: dict[str, Any] = {
        "id": table["id"].cast(pa.large_string()),
        SIZE: pa.FixedSizeListArray.from_arrays(pa.array(sizes.ravel()), len(SIZES)),
    }
    for name in table.column_names:
        if name not in ("id", *PLACES, *SIZES):
            column = table[name]
            is_text = pa.types.is_string(column.type)
            columns[name] = column.cast(pa.large_string()) if is_text else column
    return pa.table(columns).combine_chunks()


def _from_parquet(path: Path) -> tuple[UnitTable, list[pa.RecordBatch]]:
    """What the mapped files would hold, in memory."""
    table = pq.read_table(path)
    numbers = table["unit"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    firsts = table.select(["height", "width", "shard"]).take(pa.array(starts))
    shapes = np.stack([firsts["height"].to_numpy(), firsts["width"].to_numpy()], axis=1)
    units = UnitTable(
        numbers[starts], np.append(starts, len(numbers)), shapes, firsts["shard"].to_pylist()
    )
    parts = [samples_of(table.slice(start, ROWS)) for start in range(0, len(numbers), ROWS)]
    return units, [part.to_batches()[0] for part in parts]
