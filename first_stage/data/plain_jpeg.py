"""Plain JPEG files through libjpeg-turbo alone, where the package `simplejpeg` is installed.

Pillow decodes with the same library, and its pixels are the same, bit for bit. What it does in
Python for each file is most of the time that a small one takes: at 32 x 32 a file is decoded in a
quarter of it here, at 256 x 256 in nine tenths. Whatever is not plain is Pillow's. Pixels come as
an array: to make a picture of one, and an array of that, takes as long again as decoding it.
"""

import contextlib
import importlib
from typing import Any

import numpy as np

_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive, all with Huffman's code."""
_TABLES = {0xC4, 0xDB, 0xDD, 0xE0, 0xFE}
"""Huffman and quantization tables, restart intervals, JFIF, comments. Pixels may depend on what any
other segment says: EXIF orientation, a color profile, Adobe's color transform, more pictures."""
_SCAN = 0xDA
_COLORS = {1: "GRAY", 3: "RGB"}

_turbo: list[Any] = []


def decode(content: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode a file that is a plain JPEG and whole.

    Args:
        content: The file.
        max_pixels: A larger picture is left to Pillow, which says so.

    Returns:
        `(H, W, 1 or 3)` uint8, gray or RGB; `None` for what Pillow has to look at: another file,
        one with any flaw, or every one where `simplejpeg` is missing.
    """
    found = _frame(content)
    if found is None or found[0] > max_pixels or (turbo := _decoder()) is None:
        return None
    try:
        pixels: np.ndarray = turbo(content, _COLORS[found[1]], strict=True)
    except Exception:  # it may still be one that Pillow can read
        return None
    return pixels


def _frame(content: bytes) -> tuple[int, int] | None:
    """Number of pixels and of channels, from a header with nothing in it that needs a look."""
    if content[:3] != b"\xff\xd8\xff":
        return None
    found, place = None, 2
    while content[place : place + 1] == b"\xff" and len(content) >= place + 10:
        marker = content[place + 1]
        if marker == _SCAN:
            return found
        if marker in _FRAMES and found is None:
            bits, channels = content[place + 4], content[place + 9]
            if bits != 8 or channels not in _COLORS:
                return None
            height = int.from_bytes(content[place + 5 : place + 7])
            found = height * int.from_bytes(content[place + 7 : place + 9]), channels
        elif marker not in _TABLES:
            return None
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None


def _decoder() -> Any:
    """What decodes; `None` where it is missing. Looked for once."""
    if not _turbo:
        found = None
        with contextlib.suppress(ImportError):
            found = importlib.import_module("simplejpeg").decode_jpeg
        _turbo.append(found)
    return _turbo[0]
