"""Parquet and WebDataset shards, local or remote, read row by row without copying them to disk.

Rows are numbered over all shards in the order of their names. How many rows a shard has is read
from a parquet file's footer; a tar file's headers are walked once, and where its files lie is
remembered as soon as each shard is counted.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from first_stage.data import tar
from first_stage.data.columns import encoded_image, find_image_column
from first_stage.data.files import open_url, size_of_url
from first_stage.data.retry import with_retries
from first_stage.data.sample import Sample
from first_stage.errors import DataError, first_line
from first_stage.files import write_json

_ROWS_AT_ONCE = 16
_SKIP_RATHER_THAN_OPEN = 64
_OPEN_AT_ONCE = 16
_INDICES_HELD = 64


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        url: A local path, or a URL that fsspec opens.
        size: Its bytes.
        rows: Samples in it.
        name: What ids call it: its path below the data folder.
        index: Where its index is remembered, for a tar file; it is made anew where that is not.
        root: The folder that paths in its rows may lead into.
        problem: What is wrong with a file that can be read in part.
    """

    url: str
    size: int
    rows: int
    name: str = ""
    index: str | None = None
    root: str | None = None
    problem: str = ""

    @property
    def is_tar(self) -> bool:
        """Whether it is a WebDataset shard."""
        return is_tar(self.url)


def is_tar(url: str) -> bool:
    """Whether an address is that of a WebDataset shard, however its ending is written."""
    return url.lower().endswith(".tar")


def count_rows(
    urls: Sequence[tuple[str, str]],
    memory: Path | None = None,
    root: str | None = None,
) -> list[Shard]:
    """How many samples each shard has.

    Args:
        urls: The shards, as `find_shards` gives them.
        memory: A folder that remembers what was counted, shard by shard: a count that is cut off
            goes on where it was. A file of another size is counted anew.
        root: The folder that paths in rows may lead into.

    Raises:
        DataError: Naming the shard that cannot be read.
    """

    def count(entry: tuple[str, str]) -> Shard:
        url, name = entry
        try:
            size = with_retries(lambda: size_of_url(url), url)
            rows, index, problem = _counted(url, size, memory)
            return Shard(url, size, rows, name, index, root, problem)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the shard {url!r} cannot be read: {first_line(error)}") from error

    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        return list(pool.map(count, urls))


def _counted(url: str, size: int, memory: Path | None) -> tuple[int, str | None, str]:
    """Rows of a shard, where its index is remembered, and what is wrong with it."""
    if memory is None:
        if is_tar(url):
            index = _index(url, size, None)
            return len(index), None, index.problem
        return _parquet_count(url), None, ""
    place = memory / hashlib.blake2b(f"{url} {size}".encode(), digest_size=12).hexdigest()
    if is_tar(url):
        place = place.with_suffix(".npz")
        if not _is_whole(place):
            _index(url, size, None).save(place)
        index = tar.TarIndex.load(place)
        return len(index), str(place), index.problem
    place = place.with_suffix(".json")
    try:
        return int(json.loads(place.read_text())["rows"]), None, ""
    except (OSError, ValueError, KeyError):
        rows = _parquet_count(url)
        write_json(place, {"url": url, "size": size, "rows": rows})
        return rows, None, ""


def _is_whole(place: Path) -> bool:
    try:
        tar.TarIndex.load(place)
    except (OSError, ValueError, KeyError):
        return False
    return True


@functools.lru_cache(maxsize=_INDICES_HELD)
def _index(url: str, size: int, remembered: str | None) -> tar.TarIndex:
    if remembered is not None:
        try:
            return tar.TarIndex.load(Path(remembered))
        except (OSError, ValueError, KeyError):
            pass  # on another machine: walked there
    return with_retries(lambda: tar.walk(url, size), url)


def _parquet_count(url: str) -> int:
    import pyarrow.parquet

    def count() -> int:
        with open_url(url) as file:
            return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)

    return with_retries(count, url)


def _parquet_rows(url: str, column: str, start: int) -> Iterator[Any]:
    """The images from a row on; of the row groups before it nothing is read."""
    import pyarrow.parquet

    with open_url(url) as handle:
        # Without `pre_buffer` and with a small buffer, pages are read as rows are asked for.
        file = pyarrow.parquet.ParquetFile(handle, pre_buffer=False, buffer_size=1 << 20)
        groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows
                                 for i in range(file.metadata.num_row_groups))])  # fmt: skip
        first = int(np.searchsorted(groups, start, side="right")) - 1
        skip = start - int(groups[first])
        wanted = list(range(first, file.metadata.num_row_groups))
        if column not in file.schema_arrow.names:
            raise DataError(
                f"the shard {url!r} has no column {column!r}, as others have (it has "
                f"{', '.join(file.schema_arrow.names)})"
            )
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=[column])
        for batch in batches:
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            yield from batch.column(0)[skip:]
            skip = 0


class ShardedRows:
    """The rows of all shards, with cursors: what goes on where it was costs no search.

    Args:
        name: What a user would recognise.
        shards: Their files and counts.
        image_column: Column or file ending of the images; found when `None`.
        cursors: Open files at most.

    Raises:
        DataError: When there is no row, or no image column.
    """

    def __init__(
        self, name: str, shards: Sequence[Shard], image_column: str | None, cursors: int = 256
    ):
        self.name, self.shards = name, [s for s in shards if s.rows > 0]
        if not self.shards:
            raise DataError(f"data.path {name!r} holds no samples")
        first = self.shards[0]
        self.is_tar = first.is_tar
        self.image_column: str | None
        if self.is_tar:
            self.image_column = tar.image_ending(self._tar_index(0), name, image_column)
        else:
            self.image_column = _parquet_image_column(first.url, name, image_column)
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._limit = cursors
        self._cursors: dict[int, tuple[int, int, Iterator[Any]]] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay where they are: a spawned worker opens its own.
        return {**self.__dict__, "_cursors": {}, "_owner": -1}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Names beside the image, of tar shards."""
        if not self.is_tar:
            return ()
        return tar.columns_of([self._tar_index(0)], self.image_column)

    def _tar_index(self, shard: int) -> tar.TarIndex:
        facts = self.shards[shard]
        return _index(facts.url, facts.size, facts.index)

    def _place(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def id(self, row: int) -> str:
        """The shard's name, and the sample's key in it or the number of the row."""
        shard, place = self._place(row)
        name = self.shards[shard].name
        return f"{name}#{self._tar_index(shard).names[place] if self.is_tar else f'{place:09d}'}"

    def image_sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of the encoded images in these rows of tar shards; -1 for a row without one."""
        found = np.full(len(rows), -1, np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            sizes = self._tar_index(shard).image_sizes(self.image_column)
            found[mine] = sizes[rows[mine] - self.starts[shard]]
        return found

    def touched(self, row: int) -> float | None:
        """When a row's file was last changed; `None` for one that is far away."""
        url = self.shards[self._place(row)[0]].url
        if "://" in url:
            return None
        facts = os.stat(url)
        return max(facts.st_mtime, facts.st_ctime)

    def read(self, first: int, last: int, cursor: int = -1) -> list[Sample]:
        """The rows from `first` to before `last`.

        Args:
            first: Number of a row over all shards.
            last: The row to end before.
            cursor: Who reads; each reader's next rows are expected soon after its last ones.

        Raises:
            DataError: When a shard cannot be read, or is shorter than it was.
        """
        if self._owner != os.getpid():  # a forked worker shares its parent's places in open files
            self._cursors, self._owner = {}, os.getpid()
        samples: list[Sample] = []
        while first < last:
            shard, place = self._place(first)
            stop = min(last, int(self.starts[shard + 1]))
            reads = self._read_tar if self.is_tar else self._read_parquet
            samples += reads(shard, place, place + stop - first, cursor)
            first = stop
        return samples

    def _read_tar(self, shard: int, first: int, last: int, _: int) -> list[Sample]:
        facts, base = self.shards[shard], int(self.starts[shard])
        try:
            index = self._tar_index(shard)
            found = list(tar.read_samples(facts.url, index, first, last, self.image_column))
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the shard {facts.url!r} cannot be read: {first_line(error)}"
            ) from error
        return [
            Sample(self.id(base + row), image, columns)
            for row, (image, columns) in enumerate(found, first)
        ]

    def _read_parquet(self, shard: int, first: int, last: int, cursor: int) -> list[Sample]:
        facts, base = self.shards[shard], int(self.starts[shard])

        def read() -> list[Any]:
            try:
                rows = self._rows_from(shard, first, cursor)
                found = list(islice(rows, last - first))
            except Exception:
                self._cursors.pop(cursor, None)
                raise
            self._cursors[cursor] = (shard, last, rows)
            return found

        try:
            found = with_retries(read, facts.url)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the shard {facts.url!r} cannot be read: {first_line(error)}"
            ) from error
        if len(found) < last - first:
            raise DataError(f"the shard {facts.url!r} is shorter than when its rows were counted")
        return [
            Sample(self.id(base + row), encoded_image(image, (facts.root,) if facts.root else ()))
            for row, image in enumerate(found, first)
        ]

    def _rows_from(self, shard: int, row: int, cursor: int) -> Iterator[Any]:
        known = self._cursors.pop(cursor, None)
        if known is not None:
            there, position, rows = known
            if there == shard and 0 <= row - position <= _SKIP_RATHER_THAN_OPEN:
                next(islice(rows, row - position, row - position), None)
                return rows
        while len(self._cursors) >= self._limit:  # the one that has waited longest is closed
            self._cursors.pop(next(iter(self._cursors)))
        return _parquet_rows(self.shards[shard].url, str(self.image_column), row)


def _parquet_image_column(url: str, name: str, wanted: str | None) -> str:
    import datasets
    import pyarrow.parquet

    def schema() -> Any:
        with open_url(url) as handle:
            return pyarrow.parquet.read_schema(handle)

    features = datasets.Features.from_arrow_schema(with_retries(schema, url))
    return find_image_column(features, name, wanted)


class RowSource:
    """All rows of shards, wherever they lie, as a source.

    Args:
        rows: The rows.
    """

    reads_in_order = True

    def __init__(self, rows: ShardedRows):
        self.rows = rows
        self.name, self.columns = rows.name, rows.columns

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> int:
        """The row of a sample."""
        return index

    def id(self, index: int) -> str:
        """The shard's name, and the sample's key in it or the number of the row."""
        return self.rows.id(self.row(index))

    def read(self, index: int) -> Sample:
        """One sample, wherever it lies; its file is opened for it."""
        row = self.row(index)
        return self.rows.read(row, row + 1)[0]

    def touched(self, index: int) -> float | None:
        """When the sample's file was last changed; `None` for one that is far away."""
        return self.rows.touched(self.row(index))

    columns_touched = touched

    def image_sizes(self, places: np.ndarray) -> np.ndarray | None:
        """Bytes of these samples' encoded images, -1 without one; `None` where nobody knows."""
        if not self.rows.is_tar:
            return None
        return self.rows.image_sizes(np.array([self.row(index) for index in places.tolist()]))

    def fingerprint(self) -> str:
        """A hash of the shards' names, sizes and counts, wherever they lie."""
        digest = hashlib.sha256()
        for shard in self.rows.shards:
            digest.update(f"{shard.name} {shard.size} {shard.rows}\n".encode())
        return digest.hexdigest()[:16]
