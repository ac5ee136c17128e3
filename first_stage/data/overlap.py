"""Held-out images that are trained on too: looked for before anything long, at a bounded cost."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from first_stage.data.broken import BrokenImage
from first_stage.data.files import read_bytes
from first_stage.data.folder import FolderSource
from first_stage.data.sample import Source
from first_stage.data.shards import RowSource
from first_stage.data.sources import SubsetSource
from first_stage.data.table import DatasetSource
from first_stage.errors import DataError

_HELD_OUT_READ = 256
_SIZES_LOOKED_AT = 200_000
_READ = 2_000
_RUNS = 16

_Found = Iterator[tuple[str, str, str]]
"""Id of the held-out sample, id of the one trained on, and what they share."""


def refuse_shared(training: Source, held_out: Source) -> None:
    """Refuse held-out images that are trained on: by their file or row, and by their content.

    Files and rows are compared all. Content is compared for up to 256 held-out samples with the
    training samples whose encoded images are of the same size: of up to 200,000, which costs one
    look at the file system for each file of a folder and nothing for tar files and tables that are
    here. Up to 2,000 of them are read; as many of tables that are streamed, whose sizes nobody
    knows. Of more, some are taken, evenly spread, from shards in 16 runs.

    Args:
        training: The samples to train on.
        held_out: The samples to measure on.

    Raises:
        DataError: Naming the first one.
    """
    found = next(_shared(training, held_out), None)
    if found is not None:
        held, trained, what = found
        raise DataError(
            f"the held-out image {held} of {held_out.name!r} is trained on too, as {trained} of "
            f"{training.name!r} ({what}): measured on it, the first stage looks better than it "
            "is. Take it out of one of them"
        )


def _shared(training: Source, held_out: Source) -> _Found:
    if not len(training) or not len(held_out):
        return
    if isinstance(training, FolderSource) and isinstance(held_out, FolderSource):
        yield from _same_files(training, held_out)
    elif training.name == held_out.name and type(training) is type(held_out):
        yield from _same_ids(training, held_out)
    if isinstance(training, SubsetSource) or isinstance(held_out, SubsetSource):
        pass  # of the same files, but not all of their rows
    elif both := _shards_of(training).keys() & _shards_of(held_out).keys():
        place = min(both)
        yield _shards_of(held_out)[place], _shards_of(training)[place], "the same file"
    yield from _same_contents(training, held_out)


# -- files and rows --------------------------------------------------------------------------


def _same_files(training: FolderSource, held_out: FolderSource) -> _Found:
    roots = [os.path.realpath(source.root) for source in (training, held_out)]
    if os.path.commonpath(roots) not in roots:
        return
    places = {os.path.join(os.fsencode(roots[0]), path) for path in training.paths}
    for index, path in enumerate(held_out.paths):
        if (place := os.path.join(os.fsencode(roots[1]), path)) in places:
            name = os.path.relpath(place, os.fsencode(roots[0]))
            yield held_out.id(index), os.fsdecode(name), "the same file"


def _same_ids(training: Source, held_out: Source) -> _Found:
    there = {training.id(index) for index in range(len(training))}
    for index in range(len(held_out)):
        if (name := held_out.id(index)) in there:
            yield name, name, "the same row"


def _shards_of(source: Source) -> dict[str, str]:
    """Where a source's shards lie, and what ids call them."""
    if isinstance(source, DatasetSource):
        return {os.path.realpath(place): name for place, name in source.files()}
    if not isinstance(source, RowSource):
        return {}
    return {
        shard.url if "://" in shard.url else os.path.realpath(shard.url): shard.name
        for shard in source.rows.shards
    }


# -- contents --------------------------------------------------------------------------------


def _same_contents(training: Source, held_out: Source) -> _Found:
    contents: dict[bytes, int] = {}
    sizes: set[int] = set()
    for index in _some(held_out, _HELD_OUT_READ).tolist():
        size, digest = _content(held_out, index)
        if digest:
            contents.setdefault(digest, index)
            sizes.add(size)
    for index in _alike(training, sizes).tolist():
        _, digest = _content(training, index)
        if digest in contents:
            yield held_out.id(contents[digest]), training.id(index), "the same content"


def _alike(source: Source, sizes: set[int]) -> np.ndarray:
    """Places of some samples that may have encoded images of these sizes."""
    sizes_of = getattr(source, "image_sizes", None)
    places = _some(source, _SIZES_LOOKED_AT)
    known = sizes_of(places) if sizes_of is not None else None
    if known is None:
        return _some(source, _READ)
    places = places[np.isin(known, list(sizes))]
    return places[_spread(len(places), _READ)]


def _some(source: Source, most: int) -> np.ndarray:
    """So many places at most: evenly spread, or in runs where neighbours are cheap to read."""
    count = len(source)
    if count <= most or not getattr(source, "reads_in_order", False):
        return _spread(count, most)
    length = most // _RUNS
    starts = np.linspace(0, count - length, _RUNS).astype(int)
    return np.unique(starts[:, None] + np.arange(length))


def _spread(count: int, most: int) -> np.ndarray:
    """So many places at most, evenly spread."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(int)


def _content(source: Source, index: int) -> tuple[int, bytes]:
    """Size and hash of an encoded image, or of the values where there is none; an empty hash where
    it cannot be read."""
    image = source.read(index).image
    try:
        content = read_bytes(image) if isinstance(image, Path) else image
    except BrokenImage:
        return 0, b""
    if isinstance(content, Image.Image | np.ndarray):
        content = np.ascontiguousarray(content).tobytes()
    if not isinstance(content, bytes) or not content:
        return 0, b""
    return len(content), hashlib.blake2b(content, digest_size=16).digest()
