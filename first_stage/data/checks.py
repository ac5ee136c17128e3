"""What is looked at before anything long: images that are too small, values nearly black."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from first_stage.data.broken import BrokenImage
from first_stage.data.decode import Reading, open_image, picture_size
from first_stage.data.sample import Source
from first_stage.data.sources import SubsetSource
from first_stage.errors import DataError

_VALUES_LOOKED_AT = 32
_SMALL_PART = 1 / 8
_HEADERS_AT_ONCE = 16


def _spread(count: int, most: int) -> list[int]:
    """So many places at most, evenly spread."""
    if count <= most:
        return list(range(count))
    return [int(place) for place in np.linspace(0, count - 1, most)]


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
