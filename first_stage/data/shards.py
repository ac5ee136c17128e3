"""Parquet and WebDataset shards, local or remote, read row by row without copying them to disk.

Rows are numbered over all shards in the order of their names. How many rows a shard has is read
from a parquet file's footer; a tar file's headers are walked once, and the count is remembered.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from first_stage.data.sources import (
    IMAGE_SUFFIXES,
    Sample,
    encoded_image,
    find_image_column,
    shard_files,
)
from first_stage.errors import DataError, first_line
from first_stage.files import write_json

_KINDS = (".parquet", ".tar")
_ROWS_AT_ONCE = 16
_SKIP_RATHER_THAN_OPEN = 64
_OPEN_AT_ONCE = 16
# As in WebDataset: up to the first dot of the file's name is the sample's key.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        url: A local path, or a URL that fsspec opens.
        size: Its bytes.
        rows: Samples in it.
    """

    url: str
    size: int
    rows: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


def find_shards(path: str, split: str) -> list[str]:
    """The shards at a path, sorted by name.

    Args:
        path: A parquet or tar file or a folder of them, a URL of one (`s3://...`, also with `*`),
            or a data set id on the hub.
        split: Which split of a hub data set.

    Raises:
        DataError: When there are none.
    """
    if Path(path).exists():
        found = [str(file) for file in shard_files(Path(path))]
    elif "://" in path:
        found = _remote_shards(path)
    else:
        found = _hub_shards(path, split)
    suffix = next((s for s in _KINDS if any(f.endswith(s) for f in found)), None)
    if suffix is None:
        raise DataError(
            f"data.path {path!r} holds no parquet or WebDataset (.tar) shards, which "
            "data.streaming reads: convert it, or set data.streaming to false"
        )
    return sorted(f for f in found if f.endswith(suffix))


def _remote_shards(path: str) -> list[str]:
    import fsspec

    try:
        system, place = fsspec.url_to_fs(path)
        if "*" not in place and system.isdir(place):
            place = place.rstrip("/") + "/*"
        return [system.unstrip_protocol(name) for name in system.glob(place)]
    except Exception as error:
        raise DataError(f"data.path {path!r} cannot be listed: {first_line(error)}") from error


def _hub_shards(path: str, split: str) -> list[str]:
    import datasets

    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise DataError(f"data.path {path!r} does not exist")
    try:
        files = datasets.load_dataset_builder(path).config.data_files
    except Exception as error:
        raise DataError(
            f"data.path {path!r} is no file or folder here and could not be found on the hub: "
            f"{first_line(error)}"
        ) from error
    if not files or split not in files:
        there = ", ".join(files or ()) or "none"
        raise DataError(f"data.split is {split!r}, but {path!r} has the splits: {there}")
    return [str(name) for name in files[split]]


def _open(url: str) -> Any:
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


def _size(url: str) -> int:
    if "://" not in url:
        return Path(url).stat().st_size
    import fsspec

    system, place = fsspec.url_to_fs(url)
    return int(system.size(place) or 0)


def count_rows(urls: Sequence[str], memory: Path | None = None) -> list[Shard]:
    """How many samples each shard has.

    Args:
        urls: The shards.
        memory: A JSON file that remembers the counts; those of a tar file of another size are
            counted anew.

    Raises:
        DataError: Naming the shard that cannot be read.
    """
    known: dict[str, list[int]] = {}
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(memory.read_text())

    def count(url: str) -> Shard:
        try:
            size = _size(url)
            if url in known and known[url][0] == size:
                return Shard(url, size, known[url][1])
            return Shard(url, size, _count(url))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the shard {url!r} cannot be read: {first_line(error)}") from error

    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        shards = list(pool.map(count, urls))
    if memory is not None:
        write_json(memory, {shard.url: [shard.size, shard.rows] for shard in shards})
    return shards


def _count(url: str) -> int:
    if url.endswith(".tar"):
        return sum(1 for _ in _tar_rows(url, None))
    import pyarrow.parquet

    with _open(url) as file:
        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)


Row = tuple[str, Any]
"""A key (empty for parquet) and the encoded image, a path, or `None` where there is none."""


def _parquet_rows(url: str, column: str, start: int) -> Iterator[Row]:
    """The rows from `start` on; of the row groups before it nothing is read."""
    import pyarrow.parquet

    with _open(url) as handle:
        # Without `pre_buffer` and with a small buffer, pages are read as rows are asked for.
        file = pyarrow.parquet.ParquetFile(handle, pre_buffer=False, buffer_size=1 << 20)
        groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows
                                 for i in range(file.metadata.num_row_groups))])  # fmt: skip
        first = int(np.searchsorted(groups, start, side="right")) - 1
        skip = start - int(groups[first])
        wanted = list(range(first, file.metadata.num_row_groups))
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=[column])
        for batch in batches:
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            for value in batch.column(0)[skip:]:
                image = value.as_py()
                yield "", {"bytes": image, "path": None} if isinstance(image, bytes) else image
            skip = 0


def _tar_rows(url: str, column: str | None, start: int = 0) -> Iterator[Row]:
    """The samples from `start` on: files in a row with the same key. Nothing is unpacked.

    Args:
        url: The shard.
        column: Ending of the image's file name; `None` reads no contents.
        start: First sample; of those before it only headers are read.
    """
    import tarfile

    with _open(url) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
        number, current, image = -1, None, None
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which would grow with every header
            match = _MEMBER.match(member.name) if member.isfile() else None
            if match is None:
                continue
            key, ending = match[1], match[2].lower()
            if key != current:
                if current is not None and number >= start:
                    yield current, image
                number, current, image = number + 1, key, None
            if ending == column and number >= start:
                content = tar.extractfile(member)
                assert content is not None  # only of members that are no files
                image = {"bytes": content.read(), "path": None}
        if current is not None and number >= start:
            yield current, image


def _image_column(url: str, name: str, wanted: str | None) -> str:
    """The column of a parquet file, or the ending of a tar file's members, that holds images."""
    import datasets

    if url.endswith(".parquet"):
        import pyarrow.parquet

        with _open(url) as handle:
            schema = pyarrow.parquet.read_schema(handle)
        return find_image_column(datasets.Features.from_arrow_schema(schema), name, wanted)
    import tarfile

    endings: dict[str, Any] = {}
    with _open(url) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
        for member in islice(tar, 100):
            if match := _MEMBER.match(member.name):
                ending = match[2].lower()
                suffix = "." + ending.rsplit(".", 1)[-1]
                endings[ending] = datasets.Image() if suffix in IMAGE_SUFFIXES else None
    return find_image_column(endings, name, wanted)


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
        self.image_column = _image_column(self.shards[0].url, name, image_column)
        self.starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._limit = cursors
        self._cursors: dict[int, tuple[int, int, Iterator[Row]]] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return int(self.starts[-1])

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
            shard = int(np.searchsorted(self.starts, first, side="right")) - 1
            stop = min(last, int(self.starts[shard + 1]))
            samples += self._read_shard(shard, first, stop, cursor)
            first = stop
        return samples

    def _read_shard(self, shard: int, first: int, last: int, cursor: int) -> Iterator[Sample]:
        url, base = self.shards[shard].url, int(self.starts[shard])
        try:
            rows = self._rows_from(shard, first - base, cursor)
            found = list(islice(rows, last - first))
        except Exception as error:
            self._cursors.pop(cursor, None)
            raise DataError(f"the shard {url!r} cannot be read: {first_line(error)}") from error
        if len(found) < last - first:
            raise DataError(f"the shard {url!r} is shorter than when its rows were counted")
        self._cursors[cursor] = (shard, last - base, rows)
        for number, (key, image) in enumerate(found, first):
            name = f"{key}#{number:09d}" if key else f"{number:09d}"
            yield Sample(name, encoded_image(image, self.name))

    def _rows_from(self, shard: int, row: int, cursor: int) -> Iterator[Row]:
        known = self._cursors.pop(cursor, None)
        if known is not None:
            there, position, rows = known
            if there == shard and 0 <= row - position <= _SKIP_RATHER_THAN_OPEN:
                next(islice(rows, row - position, row - position), None)
                return rows
        while len(self._cursors) >= self._limit:  # the one that has waited longest is closed
            self._cursors.pop(next(iter(self._cursors)))
        url = self.shards[shard].url
        if url.endswith(".tar"):
            return _tar_rows(url, self.image_column, row)
        return _parquet_rows(url, self.image_column, row)
