"""What is looked at before anything long: held-out images that are trained on, values nearly black.

Both look at a bounded number of samples, at a cost of seconds.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from first_stage.data.broken import BrokenImage
from first_stage.data.decode import Reading, open_image, picture_size, read_bytes
from first_stage.data.folder import FolderSource
from first_stage.data.sample import Source
from first_stage.data.sources import SubsetSource
from first_stage.errors import DataError

_HELD_OUT_LOOKED_AT = 256
_TRAINING_LOOKED_AT = 200_000
_SMALL = 2_000
_VALUES_LOOKED_AT = 32
_SMALL_PART = 1 / 8
_HEADERS_AT_ONCE = 16


def refuse_shared(training: Source, held_out: Source) -> None:
    """Refuse held-out images that are trained on: by their path or row, and by their content.

    Content is compared for up to 256 held-out files, spread evenly, with the training files of the
    same size (of up to 200,000, which cost one look at the file system each), and for other sources
    of at most 2,000 samples.

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


def _shared(training: Source, held_out: Source) -> Iterator[tuple[str, str, str]]:
    if isinstance(training, FolderSource) and isinstance(held_out, FolderSource):
        yield from _same_files(training, held_out)
    elif training.name == held_out.name and type(training) is type(held_out):
        there = {training.id(index) for index in range(len(training))}
        for index in range(len(held_out)):
            if (name := held_out.id(index)) in there:
                yield name, name, "the same row"
    elif len(training) <= _SMALL:
        contents = {_content(training, index): index for index in range(len(training))}
        for index in _spread(len(held_out), _HELD_OUT_LOOKED_AT):
            if (content := _content(held_out, index)) and content in contents:
                yield held_out.id(index), training.id(contents[content]), "the same content"


def _same_files(training: FolderSource, held_out: FolderSource) -> Iterator[tuple[str, str, str]]:
    roots = [os.path.realpath(source.root) for source in (training, held_out)]
    if os.path.commonpath(roots) in roots:
        places = {os.path.join(os.fsencode(roots[0]), path) for path in training.paths}
        for index, path in enumerate(held_out.paths):
            if (place := os.path.join(os.fsencode(roots[1]), path)) in places:
                name = os.path.relpath(place, os.fsencode(roots[0]))
                yield held_out.id(index), os.fsdecode(name), "the same file"
    wanted: dict[int, list[int]] = {}
    for index in _spread(len(held_out), _HELD_OUT_LOOKED_AT):
        wanted.setdefault(_size(held_out, index), []).append(index)
    wanted.pop(-1, None)
    for index in _spread(len(training), _TRAINING_LOOKED_AT):
        for other in wanted.get(_size(training, index), ()):
            if _content(training, index) == _content(held_out, other) != b"":
                yield held_out.id(other), training.id(index), "the same content"


def _spread(count: int, most: int) -> list[int]:
    """So many places at most, evenly spread."""
    if count <= most:
        return list(range(count))
    return [int(place) for place in np.linspace(0, count - 1, most)]


def _size(source: FolderSource, index: int) -> int:
    try:
        return os.stat(source.path(index)).st_size
    except OSError:
        return -1


def _content(source: Source, index: int) -> bytes:
    image = source.read(index).image
    try:
        content = read_bytes(image) if isinstance(image, Path) else image
    except BrokenImage:
        return b""
    if isinstance(content, bytes):
        return hashlib.blake2b(content, digest_size=16).digest() if content else b""
    return b""


def large_enough(source: Source, min_side: int) -> np.ndarray:
    """Places of the images whose shorter side is long enough, from their headers.

    Those whose header cannot be read are among them: decoding will say what is wrong.

    Args:
        source: The samples.
        min_side: Least shorter side, in pixels.
    """

    def is_large(index: int) -> bool:
        side = min(picture_size(source.read(index).image))
        return side == 0 or side >= min_side

    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return np.flatnonzero(list(pool.map(is_large, range(len(source)), chunksize=64)))


def only_large(
    source: Source, chosen: np.ndarray, min_side: int, say: Callable[[str], None]
) -> Source:
    """The samples that `large_enough` found; says how many are skipped.

    Raises:
        DataError: When none is left.
    """
    if skipped := len(source) - len(chosen):
        say(f"{skipped:,} of {len(source):,} images are smaller than data.min_side ({min_side})")
    if not len(chosen):
        raise DataError(
            f"all {len(source):,} images of {source.name!r} are smaller than data.min_side "
            f"({min_side}): lower it"
        )
    return SubsetSource(source, chosen)


def value_remark(source: Source, reading: Reading | None) -> str:
    """A warning where values use a small part of their integers' range; empty otherwise.

    12-bit data in 16-bit files would be nearly black. Looks at 32 samples, spread evenly where that
    costs nothing.

    Args:
        source: The samples.
        reading: How they are read.
    """
    if reading is None or reading.value_range is not None:
        return ""
    low, high, is_deep, seen = math.inf, -math.inf, False, 0
    count = min(len(source), _VALUES_LOOKED_AT)
    in_order = getattr(source, "reads_in_order", False)
    for index in range(count) if in_order else _spread(len(source), count):
        try:
            values = np.asarray(open_image(source.read(index).image, reading))
        except BrokenImage:
            continue
        is_deep |= values.dtype != np.uint8
        seen += 1
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not seen or high > 255 * _SMALL_PART:
        return ""
    scale, top = (257.0, 65535) if is_deep else (1.0, 255)
    first, last = round(low * scale), round(high * scale)
    wanted = 2 ** max(last, 1).bit_length() - 1
    return (
        f"warning: the values of {seen} images looked at are {first} to {last} of {top}: read so, "
        f"they are nearly black. State their range, such as data.value_range [0, {wanted}]"
    )
