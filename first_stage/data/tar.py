"""WebDataset shards: where each file of a tar file lies is remembered, so any sample is one read.

Files in a row with the same key, which is the path up to the first dot of the file's name, are a
sample. Headers are walked once; after that a sample is read by its offset, and neighbours are read
together. One rule for every command, streamed or not: each sample has its own image ending; its
other files are columns, decoded only when they are asked for; what is wrong with one sample is
that sample's reason.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from first_stage.data.broken import BrokenImage
from first_stage.data.files import IMAGE_SUFFIXES, MAX_FILE_BYTES, open_url, read_range
from first_stage.data.paths import Paths, shown
from first_stage.data.retry import with_retries
from first_stage.errors import DataError
from first_stage.files import write_atomic

_MEMBER = re.compile(rb"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_READ_AT_ONCE = 32 * 2**20
_TEXT = ("txt", "text", "caption", "transcript")
_NUMBER = ("cls", "cls2", "class", "index", "id")
_ARRAYS = ("npy", "npz")
_LOOKED_AT = 1000
_SPARSE = -1
_LOOKED_BEHIND = 2**16


@dataclass
class TarIndex:
    """Where the files of a shard lie.

    Attributes:
        starts: First member of each sample, and the number of members: `(samples + 1,)`.
        offsets: First byte of each member's content.
        sizes: Bytes of each member; -1 for a sparse one, which is not read.
        codes: Each member's ending, as a place in `endings`.
        endings: The endings that occur.
        keys: The samples' keys.
        problem: What is wrong with the file; empty when it was read to its end.
    """

    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    codes: np.ndarray
    endings: list[str]
    keys: Paths
    problem: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def names(self) -> list[str]:
        """The samples' keys as text, unique: a key that comes again gets a number."""
        seen: dict[str, int] = {}
        result = []
        for key in self.keys:
            name = shown(key)
            seen[name] = seen.get(name, 0) + 1
            result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return result

    def members(self, sample: int) -> range:
        """The members of a sample."""
        return range(int(self.starts[sample]), int(self.starts[sample + 1]))

    def image_sizes(self, ending: str | None) -> np.ndarray:
        """Bytes of each sample's image, or of its array where it has none; -1 without either.

        Args:
            ending: Of the images, or `None` for each sample's own.
        """
        found = np.full(len(self), -1, np.int64)
        samples = np.repeat(np.arange(len(self)), np.diff(self.starts))
        for is_one in (_is_array, _is_image) if ending is None else (ending.__eq__,):
            chosen = np.array([is_one(name) for name in self.endings], bool)[self.codes]
            which, first = np.unique(samples[chosen], return_index=True)
            found[which] = self.sizes[chosen][first]
        return found

    def save(self, path: Path) -> None:
        """Write it as a file of arrays."""
        facts = {"endings": self.endings, "problem": self.problem}
        arrays: dict[str, Any] = {
            "starts": self.starts, "offsets": self.offsets, "sizes": self.sizes,
            "codes": self.codes, "keys": self.keys._buffer, "key_ends": self.keys._ends,
            "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        }  # fmt: skip
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        write_atomic(path, lambda p: _write(p, stream.getvalue()))

    @staticmethod
    def load(path: Path) -> "TarIndex":
        """Read it back."""
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            keys = Paths([])
            keys._buffer, keys._ends = arrays["keys"], arrays["key_ends"]
            return TarIndex(
                arrays["starts"], arrays["offsets"], arrays["sizes"], arrays["codes"],
                facts["endings"], keys, facts["problem"],
            )  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def walk(url: str, size: int) -> TarIndex:
    """Read the headers of a tar file.

    Args:
        url: A local path or a URL.
        size: Its bytes.

    Raises:
        DataError: When it is no tar file.
    """
    starts: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    codes: list[int] = []
    known: dict[str, int] = {}
    keys: list[bytes] = []
    problem = ""
    with open_url(url) as handle:
        try:
            with tarfile.open(fileobj=handle, mode="r:", errors="surrogateescape") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                    is_sparse = member.issparse()
                    if (
                        member.isfile()
                        and not is_sparse
                        and member.offset_data + member.size > size
                    ):
                        problem = "it is cut off"
                        break
                    name = member.name.encode("utf-8", "surrogateescape")
                    match = _MEMBER.match(name) if member.isfile() else None
                    if match is None or _is_hidden(name):
                        continue
                    if not keys or match[1] != keys[-1]:
                        starts.append(len(offsets))
                        keys.append(match[1])
                    ending = shown(match[2]).lower()
                    codes.append(known.setdefault(ending, len(known)))
                    offsets.append(member.offset_data)
                    sizes.append(_SPARSE if is_sparse else member.size)
                if not problem and not _ends_in_zeros(handle, tar.offset, size):
                    problem = "it is cut off or damaged"
                elif not problem and _goes_on(handle, tar.offset, size):
                    problem = "another archive follows its end mark, which is not read"
        except tarfile.TarError as error:
            if not keys:
                raise DataError(f"the shard {url!r} is no tar file: {error}") from error
            problem = f"it is damaged: {error}"
    return TarIndex(
        np.array([*starts, len(offsets)], np.int64), np.array(offsets, np.int64),
        np.array(sizes, np.int64), np.array(codes, np.int32), list(known), Paths(keys), problem,
    )  # fmt: skip


def _is_hidden(name: bytes) -> bool:
    return name.rsplit(b"/", 1)[-1].startswith(b".") or name.startswith(b"__MACOSX/")


def _ends_in_zeros(handle: Any, offset: int, size: int) -> bool:
    """Whether headers were read to the end; `tarfile` also stops, silently, at a damaged one."""
    # After an end marker the offset is behind its first block.
    for place in (offset - 512, offset):
        if 0 <= place < size:
            handle.seek(place)
            if not any(handle.read(512)):
                return True
    return offset >= size


def _goes_on(handle: Any, offset: int, size: int) -> bool:
    """Whether something stands behind the zeros that end an archive, as after `cat a.tar b.tar`."""
    handle.seek(min(offset, size))
    return any(handle.read(_LOOKED_BEHIND))


def image_ending(index: TarIndex, name: str, wanted: str | None) -> str | None:
    """Which ending holds the images, where that must be said.

    Args:
        index: Of the first shard.
        name: Path or id, for messages.
        wanted: The ending asked for.

    Returns:
        It, or `None` when every sample has at most one file that is named like an image.

    Raises:
        DataError: When no sample has an image, or the choice is not clear.
    """
    there = ", ".join(sorted(index.endings)) or "none"
    if wanted is not None:
        if wanted.lower() not in index.endings:
            raise DataError(
                f"data.image_column is {wanted!r}, but {name!r} has the columns: {there}"
            )
        return wanted.lower()
    for group in (_is_image, _is_array):
        is_one = np.array([group(ending) for ending in index.endings], bool)
        if not is_one.any():
            continue
        counted = np.add.reduceat(is_one[index.codes], index.starts[:-1])[:_LOOKED_AT]
        if (counted > 1).any():
            raise DataError(
                f"{name!r} has samples of several images (columns: {there}): set "
                "data.image_column to one of them"
            )
        return None
    raise DataError(
        f"{name!r} has no column that is clearly the image (columns: {there}): "
        "set data.image_column to one of them"
    )


def _is_image(ending: str) -> bool:
    suffix = "." + ending.rsplit(".", 1)[-1]
    return suffix in IMAGE_SUFFIXES and not _is_array(ending)


def _is_array(ending: str) -> bool:
    return ending.rsplit(".", 1)[-1] in _ARRAYS


class Columns(Mapping[str, Any]):
    """The files of a sample beside its image, decoded when they are asked for.

    Args:
        files: Their contents by ending.
    """

    def __init__(self, files: dict[str, bytes]):
        self._files = files

    def __getitem__(self, name: str) -> Any:
        """A file's value.

        Raises:
            BrokenImage: When it cannot be decoded, which makes the sample a failure.
        """
        content, kind = self._files[name], name.rsplit(".", 1)[-1]
        try:
            if kind in _TEXT:
                return content.decode("utf-8-sig").strip()
            if kind in _NUMBER:
                return int(content)
            return json.loads(content) if kind == "json" else content
        except (ValueError, RecursionError) as error:
            raise BrokenImage(f"its {name} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_samples(
    url: str, index: TarIndex, first: int, last: int, ending: str | None
) -> Iterator[tuple[bytes | BrokenImage, Columns]]:
    """The images and columns of samples that follow each other.

    Args:
        url: The shard.
        index: Of it.
        first: First sample.
        last: The one to end before.
        ending: Of the image, or `None` for each sample's own.
    """
    while first < last:
        stop = first + 1
        begin = int(index.offsets[index.starts[first]])
        while stop < last and _end_of(index, stop) - begin <= _READ_AT_ONCE:
            stop += 1
        end = _end_of(index, stop - 1)
        content = _content(url, begin, end) if end - begin <= _READ_AT_ONCE else None
        for sample in range(first, stop):
            yield _sample(url, index, sample, ending, content, begin)
        first = stop


def _end_of(index: TarIndex, sample: int) -> int:
    last = index.members(sample)[-1]
    return int(index.offsets[last] + max(index.sizes[last], 0))


def _content(url: str, begin: int, end: int) -> bytes:
    def read() -> bytes:
        content = read_range(url, begin, end)
        if len(content) < end - begin:
            raise DataError(f"the shard {url!r} is shorter than when its rows were counted")
        return content

    return with_retries(read, url)


def _sample(
    url: str, index: TarIndex, sample: int, ending: str | None, content: bytes | None, base: int
) -> tuple[bytes | BrokenImage, Columns]:
    files: dict[str, bytes] = {}
    image: bytes | BrokenImage | None = None
    for member in index.members(sample):
        name = index.endings[index.codes[member]]
        begin, size = int(index.offsets[member]), int(index.sizes[member])
        is_image = name == ending if ending is not None else _is_image(name)
        if size == _SPARSE or size > MAX_FILE_BYTES:
            if is_image:
                what = "sparse" if size == _SPARSE else f"of {size:,} bytes"
                image = BrokenImage(f"its {name} is {what}, which no image is")
            continue
        if content is None:
            value = _content(url, begin, begin + size)
        else:
            value = content[begin - base : begin - base + size]
        if is_image and image is None:
            image = value
        else:
            files.setdefault(name, value)
    if image is None and ending is None:
        array = next((name for name in files if _is_array(name)), None)
        image = files.pop(array) if array is not None else None
    if image is None:
        there = ", ".join(files) or "nothing"
        image = BrokenImage(
            f"has no {ending or 'image'} (it has {there}); files of a sample must lie side by side"
        )
    return image, Columns(files)


def columns_of(indices: Sequence[TarIndex], ending: str | None) -> tuple[str, ...]:
    """Endings that are no images, over some shards, in order of appearance."""
    found = {name: None for index in indices for name in index.endings}
    return tuple(
        name for name in found if name != ending and not (ending is None and _is_image(name))
    )
