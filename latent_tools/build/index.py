"""Writing the index from commits, a unit at a time, whatever types their columns have."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from first_stage.files import write_atomic
from latent_tools.format.files import CacheError
from latent_tools.format.index import (
    FAILURES,
    INDEX,
    ROWS,
    SAMPLES,
    UNITS,
    UnitTable,
    samples_of,
)

_FIXED = pa.schema(
    {
        "id": pa.string(), "unit": pa.int32(), "row": pa.int32(), "shard": pa.string(),
        "height": pa.int32(), "width": pa.int32(),
        "original_height": pa.int32(), "original_width": pa.int32(),
        "crop_top": pa.int32(), "crop_left": pa.int32(), "content": pa.string(),
    }
)  # fmt: skip
_FAILED = pa.schema({"id": pa.string(), "reason": pa.string(), "unit": pa.int32()})


class ColumnTypes:
    """Arrow types of the carried columns, as far as the units seen so far tell."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._as_text: set[str] = set()

    def take_in(self, columns: dict[str, list[Any]]) -> bool:
        """Make room for a unit's values; whether rows that were written before have other types."""
        changed = False
        for name, values in columns.items():
            if name in self._as_text:
                continue
            known = self._types.get(name)
            try:
                found = pa.array(values).type
                if known is not None and known != found:
                    fields = [pa.schema({name: kind}) for kind in (known, found)]
                    found = pa.unify_schemas(fields, promote_options="permissive").field(name).type
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                # Values of mixed types have no Arrow column: they are kept as JSON text.
                self._as_text.add(name)
                found = pa.string()
            changed |= found != known
            self._types[name] = found
        return changed

    def schema(self) -> pa.Schema:
        """Of `index.parquet`."""
        # A column named like one of the index's own must not hide it.
        named = {
            name if name not in _FIXED.names else f"data_{name}": kind
            for name, kind in self._types.items()
        }
        return pa.schema([*_FIXED, *named.items()])

    def arrays(self, columns: dict[str, list[Any]], count: int) -> list[pa.Array]:
        """A unit's values as Arrow has them."""
        arrays = []
        for name, kind in self._types.items():
            values = columns.get(name, [None] * count)
            if name in self._as_text:
                values = [json.dumps(value, ensure_ascii=False) for value in values]
            arrays.append(pa.array(values, kind))
        return arrays


class _Wider(Exception):
    """A unit does not fit the types of those before it."""


class IndexWriter:
    """Takes commits in the order of their units; see `write_index`.

    Args:
        files: Where to write `index.parquet`, `index.arrow`, `units.arrow`, `failures.parquet`.
        types: Of the carried columns; a commit that does not fit makes them wider.
        is_first: Whether nothing is known of the types yet.
    """

    def __init__(self, files: tuple[Path, Path, Path, Path], types: ColumnTypes):
        self._files, self.types = files, types
        self._stack = ExitStack()
        self._tables: list[pa.Table] = []
        self._held = 0
        self._rows = 0
        self._units: list[tuple[int, int, int, int, str]] = []
        self._failures: list[dict[str, Any]] = []
        self._writers: tuple[Any, Any] | None = None
        self._failed = self._stack.enter_context(
            pq.ParquetWriter(files[3], _FAILED, compression="zstd")
        )

    def add(self, commit: dict[str, Any]) -> None:
        """Add a unit.

        Raises:
            _Wider: When its columns need wider types: all units have to be added again.
        """
        self._failures += [{"unit": commit["unit"], **one} for one in commit["failures"]]
        if len(self._failures) >= ROWS:
            self._write_failures()
        if not commit["count"]:
            return
        if self.types.take_in(commit["columns"]) and self._rows:
            raise _Wider
        self._tables.append(self._table(commit))
        self._units.append(
            (commit["unit"], self._rows, commit["height"], commit["width"], commit["shard"])
        )
        self._rows += commit["count"]
        self._held += commit["count"]
        while self._held >= ROWS:
            self._write(ROWS)

    def _table(self, commit: dict[str, Any]) -> pa.Table:
        count = commit["count"]
        sizes, crops = np.array(commit["original_size"]), np.array(commit["crop"])
        fixed = [
            commit["ids"], [commit["unit"]] * count, range(count), [commit["shard"]] * count,
            [commit["height"]] * count, [commit["width"]] * count,
            sizes[:, 0], sizes[:, 1], crops[:, 0], crops[:, 1], commit["content"],
        ]  # fmt: skip
        arrays = [pa.array(v, kind) for v, kind in zip(fixed, _FIXED.types, strict=True)]
        carried = self.types.arrays(commit["columns"], count)
        return pa.table([*arrays, *carried], schema=self.types.schema())

    def _write(self, rows: int) -> None:
        whole = pa.concat_tables(self._tables)
        part, rest = whole.slice(0, rows), whole.slice(rows)
        self._tables, self._held = [rest], rest.num_rows
        samples = samples_of(part)
        if self._writers is None:
            self._writers = (
                self._stack.enter_context(
                    pq.ParquetWriter(self._files[0], part.schema, compression="zstd")
                ),
                self._stack.enter_context(pa.ipc.new_file(str(self._files[1]), samples.schema)),
            )
        parquet, arrow = self._writers
        parquet.write_table(part, row_group_size=ROWS)
        arrow.write_table(samples, max_chunksize=ROWS)

    def _write_failures(self) -> None:
        self._failed.write_table(pa.Table.from_pylist(self._failures, _FAILED))
        self._failures = []

    def finish(self) -> None:
        """Write what is held."""
        if not self._tables:
            self._tables = [self.types.schema().empty_table()]
        if self._held or self._writers is None:
            self._write(max(1, self._held))
        self._write_failures()
        numbers, starts, heights, widths, shards = (
            zip(*self._units, strict=True) if self._units else ((),) * 5
        )
        table = UnitTable(
            np.array(numbers, np.int64), np.array([*starts, self._rows], np.int64),
            np.array([heights, widths], np.int64).T.reshape(-1, 2), list(shards),
        ).to_table()  # fmt: skip
        with pa.ipc.new_file(str(self._files[2]), table.schema) as units:
            units.write_table(table)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def write_index(folder: Path, add_all: Callable[[Callable[[dict[str, Any]], None]], None]) -> None:
    """Write the index's files, all or none.

    Args:
        folder: The cache.
        add_all: Calls what it is given with each commit, in the order of the units; called again
            when the units turn out to disagree about a column's type.
    """
    types = ColumnTypes()

    def write(*files: Path) -> None:
        while True:
            writer = IndexWriter(files, types)  # type: ignore[arg-type]
            try:
                add_all(writer.add)
                writer.finish()
                return
            except _Wider:
                continue
            finally:
                writer.close()

    _write_together([folder / name for name in (INDEX, SAMPLES, UNITS, FAILURES)], write)


def _write_together(paths: list[Path], write: Callable[..., None], *temporary: Path) -> None:
    """Write several files at once, each atomically; the first is renamed last."""
    if not paths:
        write(*temporary)
        return
    write_atomic(paths[0], lambda one: _write_together(paths[1:], write, *temporary, one))


def is_written(folder: Path, samples: int) -> bool:
    """Whether the index's files are there, readable, and of so many samples."""
    try:
        is_whole = pq.read_metadata(folder / INDEX).num_rows == samples
        pq.read_metadata(folder / FAILURES)
        with pa.memory_map(str(folder / SAMPLES)) as file:
            reader = pa.ipc.open_file(file)
            last = range(reader.num_record_batches)[-1:]
            rows = sum(max(0, n) * ROWS + reader.get_batch(n).num_rows for n in last)
        return is_whole and rows == samples and (folder / UNITS).exists()
    except (OSError, pa.ArrowException, CacheError):
        return False
