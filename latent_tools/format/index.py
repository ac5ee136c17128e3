"""The index: what stands where in a finished cache, and what is known of each sample.

`index.parquet` is for people and other programs. `index.arrow` and `units.arrow` hold the same
uncompressed, so that readers map them: nothing is loaded, a row costs the same at any number of
samples, and all workers and processes of a machine share the pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def has_one_shape(self) -> bool:
        """Whether all units have the same; looked for once, not for every batch."""
        return bool((self.shapes == self.shapes[:1]).all())

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
            content = self._mapped(rows)
            if content is None:  # of an older release, or written over by one
                units, content = _from_parquet(self.folder / INDEX)
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
        batches = _batches(content)
        self.units, self._rows = units, rows
        names = batches[0].schema.names if batches else ["id", SIZE]
        self._arrays = {name: [batch.column(name) for batch in batches] for name in names}
        self._values = {name: _reader(arrays, content) for name, arrays in self._arrays.items()}
        self.column_names = [name for name in names if name not in ("id", SIZE)]

    def _mapped(self, rows: int) -> pa.Buffer | None:
        if not ((self.folder / SAMPLES).exists() and (self.folder / UNITS).exists()):
            return None
        content = pa.memory_map(str(self.folder / SAMPLES)).read_buffer()
        return content if sum(b.num_rows for b in _batches(content)) == rows else None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def __len__(self) -> int:
        return self._rows

    def values(self, name: str, rows: np.ndarray) -> list[Any]:
        """A column's values, as Python has them: the time does not depend on the column's length.

        Args:
            name: `id`, or a carried column.
            rows: `(N,)` int64, which.
        """
        found = self._values[name](rows)
        return found.tolist() if isinstance(found, np.ndarray) else found

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """`(N, 4)` int64: original height and width, and the crop's top and left."""
        return np.asarray(self._values[SIZE](rows), np.int64).reshape(-1, len(SIZES))

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


def _batches(content: pa.Buffer) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.BufferReader(content))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _reader(
    arrays: list[pa.Array], content: pa.Buffer
) -> Callable[[np.ndarray], np.ndarray | list[Any]]:
    """What gives a column's values: text and whole numbers straight from the mapped bytes."""
    kind = arrays[0].type if arrays else pa.null()
    if not any(array.null_count or array.offset for array in arrays):
        if pa.types.is_large_string(kind):
            return _Text(arrays, content)
        if pa.types.is_int64(kind):
            return _Numbers(arrays, content, np.int64)
        if pa.types.is_fixed_size_list(kind) and pa.types.is_int32(kind.value_type):
            return _Numbers([array.values for array in arrays], content, np.int32, kind.list_size)
    return lambda rows: [arrays[n >> _SHIFT][n & (ROWS - 1)].as_py() for n in rows.tolist()]


class _Numbers:
    """Whole numbers, some of them to a row.

    In a large index every row lies in memory that the processor has not seen for long. Fetched
    together, rows are waited for together: one by one they made reading 10 M samples a fifth slower
    than 20 thousand.

    Args:
        arrays: The column, in batches of `ROWS`.
        content: What all of them lie in.
        dtype: Of the numbers.
        together: Numbers of a row.
    """

    def __init__(self, arrays: list[pa.Array], content: pa.Buffer, dtype: Any, together: int = 1):
        size = np.dtype(dtype).itemsize
        self._all = np.frombuffer(content, dtype, content.size // size)
        self._starts = _places(arrays, content, 1) // size
        self._together = together

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """`(N,)`, or `(N, together)`."""
        first = self._starts[rows >> _SHIFT] + (rows & (ROWS - 1)) * self._together
        if self._together == 1:
            return self._all[first]
        return self._all[first[:, None] + np.arange(self._together)]


class _Text:
    """Text; see `_Numbers`.

    Args:
        arrays: The column, in batches of `ROWS`.
        content: What all of them lie in.
    """

    def __init__(self, arrays: list[pa.Array], content: pa.Buffer):
        self._offsets = np.frombuffer(content, np.int64, content.size // 8)
        self._starts = _places(arrays, content, 1) // 8
        self._texts = _places(arrays, content, 2)
        self._bytes, self._view = np.frombuffer(content, np.uint8), memoryview(content)

    def __call__(self, rows: np.ndarray) -> list[str]:
        """`(N,)` texts."""
        batch = rows >> _SHIFT
        places = self._starts[batch] + (rows & (ROWS - 1))
        ends = self._offsets[places + 1] + self._texts[batch]
        starts = self._offsets[places] + self._texts[batch]
        self._bytes[starts]  # fetched together, then copied one by one
        view = self._view
        return [
            str(view[start:end], "utf8")
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]


def _places(arrays: list[pa.Array], content: pa.Buffer, number: int) -> np.ndarray:
    """Where one of the buffers of each array begins in what all of them lie in."""
    buffers = [array.buffers()[number] for array in arrays]
    # An empty buffer lies anywhere.
    return np.array([b.address - content.address if b and b.size else 0 for b in buffers])


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


def _from_parquet(path: Path) -> tuple[UnitTable, pa.Buffer]:
    """The units, and what `index.arrow` would hold, in memory."""
    table = pq.read_table(path)
    numbers = table["unit"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    firsts = table.select(["height", "width", "shard"]).take(pa.array(starts))
    shapes = np.stack([firsts["height"].to_numpy(), firsts["width"].to_numpy()], axis=1)
    units = UnitTable(
        numbers[starts], np.append(starts, len(numbers)), shapes, firsts["shard"].to_pylist()
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, samples_of(table.slice(0, 0)).schema) as writer:
        for start in range(0, len(numbers), ROWS):
            writer.write_table(samples_of(table.slice(start, ROWS)))
    return units, sink.getvalue()
