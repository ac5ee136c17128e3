"""Images of any number of channels: `.npy`, `.npz` and multi-band TIFF files as arrays.

Where the channels stand: a two-dimensional array has one. Of a three-dimensional one they are the
last axis, unless only the first one has as many entries as are asked for, or, where
`Reading.select` chooses among an unknown number, is the shorter of the two. A TIFF's samples are
channels; so are the pages of a TIFF of as many one-sample pages as are asked for (or of any
number, where `select` chooses).
"""

import contextlib
import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from first_stage.data import dicom
from first_stage.data.broken import BrokenImage

if TYPE_CHECKING:
    from first_stage.data.decode import Reading

SUFFIXES = (".npy", ".npz")
_BYTES_PER_PIXEL = 64
"""An array may take so many bytes for each pixel that `max_pixels` allows."""
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PREFERRED = ("image", "arr_0")
_BITS, _SAMPLES, _EXTRA, _PLANAR, _FORMAT = 258, 277, 338, 284, 339
_SIGNED = 2


def may_be_array(head: bytes) -> bool:
    """Whether a file that begins so may be one of an array."""
    return head.startswith((_NPY, _ZIP, *_TIFF)) or dicom.is_dicom(head)


def read(content: bytes, reading: "Reading") -> np.ndarray | None:
    """The values `(H, W, bands)` in a file, or `None` for a file that Pillow reads as well.

    Raises:
        BrokenImage: When it is such a file and cannot be read.
    """
    if content.startswith(_NPY):
        return channels_last(_npy(io.BytesIO(content), reading), reading)
    if content.startswith(_ZIP):
        return channels_last(_npz(content, reading), reading)
    if content.startswith(_TIFF):
        values = _tiff(content, reading)
        return None if values is None else channels_last(values, reading)
    if dicom.is_dicom(content):
        values = dicom.read(content, lambda shape, kind: _check_size(shape, kind, reading))
        return channels_last(values, reading)
    return None


def header_shape(content: bytes, reading: "Reading") -> tuple[int, int] | None:
    """(height, width) of an array file; `None` for other files."""
    if not may_be_array(content[:132]):
        return None
    values = read(content, reading)
    return None if values is None else (values.shape[0], values.shape[1])


def channels_last(values: np.ndarray, reading: "Reading") -> np.ndarray:
    """An array as `(H, W, C)`; see the top of this module.

    Raises:
        BrokenImage: When it has not two or three dimensions, or no pixel.
    """
    _check_size(values.shape, values.dtype, reading)
    if values.ndim == 2:
        values = values[:, :, None]
    first, last = values.shape[0], values.shape[-1]
    wanted = reading.channels
    if reading.select is not None:
        is_first = first < last
    else:
        is_first = last != wanted and (first == wanted or (first == 1 and last > 1))
    return np.moveaxis(values, 0, 2) if is_first else values


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], reading: "Reading") -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        raise BrokenImage(f"an array of shape {tuple(shape)} is no image")
    if dtype.kind not in "biuf":
        raise BrokenImage(f"an array of type {dtype} is no image")
    # Kept in Python's numbers: a header may state a shape whose product overflows.
    count = 1
    for side in shape:
        count *= int(side)
    pixels = count // max(min(shape), 1) if len(shape) == 3 else count
    if pixels > reading.max_pixels or count * dtype.itemsize > _BYTES_PER_PIXEL * max(
        reading.max_pixels, 1
    ):
        raise BrokenImage(
            f"an array of shape {tuple(shape)} is more than data.max_pixels "
            f"({reading.max_pixels:,}) allows"
        )


def _npy(stream: Any, reading: "Reading") -> np.ndarray:
    version = np.lib.format.read_magic(stream)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if header is None:
        raise BrokenImage(f"an npy file of version {version}, which is not read")
    shape, is_fortran, dtype = header(stream)
    _check_size(shape, dtype, reading)
    count = int(np.prod(shape))
    content = stream.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise BrokenImage("the npy file is truncated")
    flat = np.frombuffer(content, dtype, count)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _npz(content: bytes, reading: "Reading") -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        stems = [name.removesuffix(".npy") for name in names]
        chosen = [name for name in _PREFERRED if name in stems] or stems
        if not stems or (len(stems) > 1 and chosen is stems):
            raise BrokenImage(
                f"an npz file with the arrays {', '.join(stems) or 'none'}: name one 'image'"
            )
        with archive.open(f"{chosen[0]}.npy") as stream:  # unpacks no more than is asked for
            return _npy(stream, reading)


def _tiff(content: bytes, reading: "Reading") -> np.ndarray | None:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=["TIFF"]) as image:
        if _is_plain(image, reading):
            return None
    try:
        import tifffile
    except ImportError:
        raise BrokenImage(
            "a TIFF file of several bands or pages or of an unusual type: "
            "pip install 'first-stage[tiff]'"
        ) from None
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        first: Any = file.pages[0]
        shape = tuple(int(side) for side in first.shape)
        if len(shape) == 2 and len(file.pages) > 1:
            alike = [page for page in file.pages if page.shape == first.shape]
            if reading.select is not None or len(alike) == reading.channels:
                _check_size((*shape, len(alike)), np.dtype(first.dtype), reading)
                return np.stack([page.asarray() for page in alike], axis=2)
        _check_size(shape, np.dtype(first.dtype), reading)
        values = np.asarray(first.asarray())
        separate = first.planarconfig == 2 and values.ndim == 3
        return np.moveaxis(values, 0, 2) if separate else values


def _is_plain(image: Any, reading: "Reading") -> bool:
    """Whether Pillow reads all that is asked for of a TIFF file."""
    tags = image.tag_v2
    samples = int(tags.get(_SAMPLES, 1))
    bits = set(tags.get(_BITS, (1,)))
    if bits == {8} and _SIGNED in tags.get(_FORMAT, ()):  # whose sign Pillow drops
        return False
    if samples == 1:
        is_stack = getattr(image, "n_frames", 1) > 1 and (
            reading.select is not None or image.n_frames == reading.channels != 1
        )
        return not is_stack and image.mode in ("1", "L", "P", "I", "F", "I;16", "I;16B", "I;16L")
    if samples > 4 or bits != {8}:
        # 16-bit color in one plane is read at full precision from Pillow, too.
        return samples in (3, 4) and bits == {16} and tags.get(_PLANAR, 1) == 1 and (
            samples == 3 or tags.get(_EXTRA) in ((1,), (2,), 1, 2)
        )  # fmt: skip
    if samples == 4 and image.mode == "RGB":  # a fourth band that is not alpha would be dropped
        return False
    return samples != 2 or image.mode == "LA"


def chosen(values: np.ndarray, reading: "Reading") -> np.ndarray:
    """The bands asked for of `(H, W, bands)`; one band stays one where it may stand for gray.

    Raises:
        BrokenImage: When there are not as many.
    """
    bands = values.shape[2]
    if reading.select is not None:
        if max(reading.select) >= bands:
            raise BrokenImage(
                f"{bands} channels, 0 to {bands - 1}, but data.channels asks for "
                f"{max(reading.select)}"
            )
        return values[:, :, list(reading.select)]
    if bands == reading.channels or (bands == 1 and reading.channels in (3, 4)):
        return values
    raise BrokenImage(wrong_number(bands, reading))


def wrong_number(bands: int, reading: "Reading") -> str:
    """What to say of a file with another number of channels."""
    return (
        f"{bands} channel{'s' if bands > 1 else ''}, but {reading.channels} are asked for: say "
        "which with data.channels, or change model.in_channels"
    )


def to_pixels(values: np.ndarray, reading: "Reading") -> np.ndarray:
    """Stored values as pixels: `(H, W, C)`, uint8 as they are, anything else float32 in 0..255.

    Raises:
        BrokenImage: When no range is known for them, or they are not numbers.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "f" and np.isnan(values).any():
        raise BrokenImage("holds values that are not numbers (NaN)")
    if reading.value_range is not None:
        low, high = reading.value_range
        wide = np.dtype(np.float32 if size <= 2 else np.float64)
        scaled = (values.astype(wide) - wide.type(low)) * wide.type(255.0 / (high - low))
        return np.clip(scaled, 0.0, 255.0).astype(np.float32)
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "u" and size == 1:
        return np.ascontiguousarray(values)
    if kind == "u" and size == 2:
        return values.astype(np.float32) / np.float32(257.0)
    if kind == "i" and size == 4 and values.min() >= 0 and values.max() <= 65535:
        # Pillow's mode I: what image files put into it is 16-bit gray.
        return values.astype(np.float32) / np.float32(257.0)
    name = "float" if kind == "f" else str(values.dtype)
    raise BrokenImage(
        f"{name} pixels, {values.min():g} to {values.max():g}, have no stated range: "
        "set data.value_range"
    )
