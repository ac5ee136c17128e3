"""Data larger than the disk: parquet files read where they are, a row group at a time.

Nothing is downloaded as a whole. The footers of the files say how many rows there are, so the plan
is fixed before the first image is read, and a launch resumes like any other: by what is committed.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from first_stage.data import Encoded, Sample
from first_stage.data.columns import encoded_image, find_image_column
from first_stage.files import patiently
from latent_tools.format.files import CacheError

_HELD_BYTES = 1 << 29
"""Row groups that are planned together, and held by whoever reads them, have so many bytes."""


class ParquetStream:
    """A source of samples in parquet files, here or far away.

    Attributes:
        name: The path or id it was opened with.
        columns: Columns beside the image.
        reads_in_order: Tells the cache that neighbours are cheap to read after each other.

    Args:
        path: A parquet file, a folder of them (nested or not), any address that fsspec knows
            (`hf://`, `s3://`, `https://`), or a data set id on the Hugging Face hub.
        image_column: The column with the images; found by type and name when `None`.
        split: Of files named after splits, which.

    Raises:
        CacheError: When there are no parquet files, or they cannot be read.
    """

    reads_in_order = True

    def __init__(self, path: str, image_column: str | None = None, split: str = "train"):
        import datasets

        self.name = path
        self._files, self._root = _parquet_files(path, split)
        footers = self._footers()
        schema: pa.Schema = footers[0].schema.to_arrow_schema()
        features = datasets.Features.from_arrow_schema(schema)
        self.image_column = find_image_column(features, path, image_column)
        self.columns: tuple[str, ...] = tuple(c for c in schema.names if c != self.image_column)
        groups = [
            (file, group, footer.row_group(group))
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = np.array([(file, group) for file, group, _ in groups]).reshape(-1, 2)
        self._bytes = np.array([group.total_byte_size for *_, group in groups], np.int64)
        self._starts = np.cumsum([0, *(group.num_rows for *_, group in groups)])
        self._file_starts = np.cumsum([0, *(footer.num_rows for footer in footers)])
        self._wanted: list[str] | None = None
        self._kept: dict[int, pa.Table] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def with_columns(self, columns: Sequence[str]) -> "ParquetStream":
        """The same source, of which only the images and these columns are read."""
        other = copy.copy(self)
        other._wanted, other._kept = [self.image_column, *columns], {}
        return other

    def __len__(self) -> int:
        return int(self._starts[-1])

    def id(self, index: int) -> str:
        """The file's path and the row's number in it."""
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        return f"{self._files[file]}#{index - int(self._file_starts[file]):09d}"

    def read(self, index: int) -> Sample:
        """A row's encoded image and its other columns; fetches its row group when it is another."""
        place = self._place(index)
        table = self._group(place).slice(index - int(self._starts[place]), 1)
        image = self._image(table[self.image_column])
        row = table.drop_columns([self.image_column]).to_pylist()[0]
        return Sample(self.id(index), image, row)

    def runs(self, positions: np.ndarray) -> list[np.ndarray]:
        """Positions, in order, cut where the row group changes."""
        places = np.searchsorted(self._starts, positions, side="right")
        return np.split(positions, np.flatnonzero(np.diff(places)) + 1)

    def images(self, run: np.ndarray) -> Iterator[Encoded]:
        """The encoded images of one of the `runs`; any number of threads may read."""
        place = self._place(int(run[0]))
        images = self._load(place, [self.image_column])[self.image_column]
        for index in run.tolist():
            yield self._image(images.slice(index - int(self._starts[place]), 1))

    def stretches(self, positions: np.ndarray, samples: int) -> list[int]:
        """How many positions, in order, to plan together: of row groups that one process can hold.

        Args:
            positions: The positions.
            samples: About how many; a stretch ends with a row group.
        """
        counts: list[int] = []
        rows = size = 0
        for run in self.runs(positions):
            size_of_run = int(self._bytes[self._place(int(run[0]))])
            if rows and (rows >= samples or size + size_of_run > _HELD_BYTES):
                counts.append(rows)
                rows = size = 0
            rows, size = rows + len(run), size + size_of_run
        return [*counts, rows] if rows else counts

    def _place(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _image(self, value: pa.ChunkedArray) -> Encoded:
        return encoded_image(value.combine_chunks()[0], (self._root,))

    def _group(self, place: int) -> pa.Table:
        # Kept per process: a forked worker must not use its parent's memory as its own.
        if self._owner != os.getpid():
            self._kept, self._owner = {}, os.getpid()
        table = self._kept.pop(place, None)
        if table is None:
            table = self._load(place, self._wanted)
            held = sum(kept.nbytes for kept in self._kept.values()) + table.nbytes
            for other in list(self._kept):  # the one that was used longest ago goes first
                if held <= _HELD_BYTES:
                    break
                held -= self._kept.pop(other).nbytes
        self._kept[place] = table
        return table

    def _load(self, place: int, columns: list[str] | None) -> pa.Table:
        file, group = self._groups[place].tolist()
        try:
            return patiently(lambda: self._fetch(file, group, columns), repr(self._files[file]))
        except (OSError, pa.ArrowException) as error:
            raise CacheError(
                f"{self._files[file]!r} of {self.name!r} cannot be read: {error}; start the "
                "same command again to go on"
            ) from error

    def _fetch(self, file: int, group: int, columns: list[str] | None) -> pa.Table:
        with self._open(file) as stream:
            return pq.ParquetFile(stream).read_row_group(group, columns=columns)

    def _open(self, file: int) -> Any:
        import fsspec

        system, root = fsspec.core.url_to_fs(self._root)
        return system.open(f"{root.rstrip('/')}/{self._files[file]}", "rb")

    def _footer(self, file: int) -> Any:
        with self._open(file) as stream:
            return pq.ParquetFile(stream).metadata

    def _footers(self) -> Sequence[Any]:
        def footer(file: int) -> Any:
            try:
                return patiently(lambda: self._footer(file), repr(self._files[file]))
            except (OSError, pa.ArrowException) as error:
                raise CacheError(
                    f"{self._files[file]!r} of {self.name!r} is no parquet file: {error}"
                ) from error

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(footer, range(len(self._files))))


def _parquet_files(path: str, split: str) -> tuple[list[str], str]:
    """Paths of parquet files relative to a root address, sorted, and that address."""
    import fsspec

    tried = [path]
    if "://" not in path:
        if Path(path).is_file():
            return [Path(path).name], str(Path(path).resolve().parent)
        if not Path(path).is_dir() and path.count("/") == 1 and path[0] not in "./~":
            # The hub converts data sets of other formats to parquet on a branch of its own.
            tried = [f"hf://datasets/{path}", f"hf://datasets/{path}@refs/convert/parquet"]
    for root in tried:
        try:
            system, inside = fsspec.core.url_to_fs(root)
            found = [str(file) for file in system.find(inside) if str(file).endswith(".parquet")]
        except (OSError, ValueError, ImportError) as error:
            raise CacheError(f"data.path {path!r} cannot be listed: {error}") from error
        if found:
            prefix = inside.rstrip("/") + "/"
            files = sorted(file.removeprefix(prefix) for file in found)
            named = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
            return [f for f in files if named.search(f)] or files, root
    raise CacheError(
        f"data.path {path!r} has no parquet files: data.streaming reads parquet, where it lies"
    )
