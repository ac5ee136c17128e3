"""Data larger than the disk: parquet files read where they are, a row group at a time.

Nothing is downloaded as a whole. The footers of the files say how many rows there are, so the plan
is fixed before the first image is read, and a launch resumes like any other: by what is committed.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from first_stage.data import Sample
from first_stage.data.sources import encoded_image, find_image_column
from latent_tools.format.files import CacheError, patiently


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
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = np.array([(file, group) for file, group, _ in groups]).reshape(-1, 2)
        self._starts = np.cumsum([0, *(rows for *_, rows in groups)])
        self._file_starts = np.cumsum([0, *(footer.num_rows for footer in footers)])
        self._kept: tuple[int, int, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def id(self, index: int) -> str:
        """The file's path and the row's number in it."""
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        return f"{self._files[file]}#{index - int(self._file_starts[file]):09d}"

    def read(self, index: int) -> Sample:
        """A row's encoded image and its other columns; fetches its row group when it is another."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._group(place)
        row = table.slice(index - int(self._starts[place]), 1).to_pylist()[0]
        value = row.pop(self.image_column)
        if isinstance(value, bytes):
            value = {"bytes": value}
        return Sample(self.id(index), encoded_image(value, self.name), row)

    def _group(self, place: int) -> pa.Table:
        # Kept per process: a forked worker must not use its parent's connections.
        if self._kept is None or self._kept[:2] != (os.getpid(), place):
            file, group = self._groups[place].tolist()
            try:
                table = patiently(lambda: self._fetch(file, group), repr(self._files[file]))
            except (OSError, pa.ArrowException) as error:
                raise CacheError(
                    f"{self._files[file]!r} of {self.name!r} cannot be read: {error}; start the "
                    "same command again to go on"
                ) from error
            self._kept = (os.getpid(), place, table)
        return self._kept[2]

    def _fetch(self, file: int, group: int) -> pa.Table:
        with self._open(file) as stream:
            return pq.ParquetFile(stream).read_row_group(group)

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
