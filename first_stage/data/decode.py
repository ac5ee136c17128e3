"""From an encoded image to a picture: the only place that decodes.

Stated rule for reading a file into `channels` channels:

1. EXIF orientation is applied; where the EXIF data are damaged the picture is used as it lies.
2. An embedded color profile is converted to sRGB (`Reading.color` "keep" leaves it): at 8 bits, and
   of 16-bit files at 16 where it is one of curves and a matrix, not of tables.
3. More than 8 bits per value keep their precision: 16-bit gray and color (PNG, TIFF) and arrays
   are scaled into 0..255 as float32, unsigned 16-bit values divided by 257.
4. Palette, CMYK, YCbCr, LAB and HSV files become RGB, or RGBA where they carry transparency.
5. For 1 and 3 channels a transparent image is laid over white. For 4 channels alpha is kept; an
   opaque image gets alpha 255.
6. One channel is the luma of ITU-R 601; gray is repeated for three channels.
7. `.npy`, `.npz` and TIFF files of any number of bands are read as arrays (see `arrays`).
   `Reading.select` chooses among the bands as they are stored, and `Reading.value_range` says
   which stored values are black and white; with either of them nothing is made of colors.

Formats are an explicit list: Pillow's others are never asked, EPS (which starts Ghostscript) and
those that only read stubs above all. Whatever goes wrong while decoding is a `BrokenImage`.
"""

import contextlib
import importlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from first_stage.data import arrays, deep_color, foreign, plain_jpeg, reduced
from first_stage.data.broken import BrokenImage, MachineFault
from first_stage.data.color import to_srgb
from first_stage.data.files import read_bytes
from first_stage.errors import first_line
from first_stage.files import is_of_the_machine

FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG"),
    *("PPM", "QOI", "TGA", "TIFF", "WEBP", "HEIF", "JXL"),
)
"""The formats that are asked of Pillow."""
MAX_PIXELS = 100_000_000

_PLUGINS = {"HEIF": ("pillow_heif", "register_heif_opener"), "JXL": ("pillow_jxl", None)}
_PHOTOMETRIC, _ORIENTATION = 262, 274  # tags of TIFF and EXIF
_TRANSPARENT = {"RGBA", "LA", "PA", "RGBa", "La"}
_INTEGERS = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
_OTHER_BYTE_ORDER = {"L": "B", "B": "L", "N": "B" if os.sys.byteorder == "little" else "L"}  # type: ignore[attr-defined]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Encoded = bytes | Path | Image.Image | np.ndarray | BrokenImage
"""What a source gives for a sample: encoded bytes, a path, a decoded picture, an array of values
`(H, W)`, `(H, W, C)` or `(C, H, W)`, or the reason why there is none."""
Picture = Image.Image | np.ndarray
"""A decoded image: mode `L`, `RGB` or `RGBA`; or `(H, W, C)`, uint8 or float32 in 0..255."""


@dataclass(frozen=True)
class Reading:
    """How encoded images become pictures.

    Attributes:
        channels: Channels to read into.
        select: Which of the stored bands become channels, counted from 0; `None` takes all, by
            the rule at the top of this module.
        value_range: Stored values that become -1 and 1; values outside are clipped. `None`: the
            range of 8-bit and unsigned 16-bit integers.
        color: "srgb" converts embedded profiles to sRGB, "keep" takes the numbers as they are.
        max_pixels: Larger pictures are not decoded.
        display: Which three channels (or one) pictures show; `None`: the first three, or the
            colors.
        upright: Apply EXIF orientation.
        reduced: Decode JPEGs at a part of their size, where that is enough: see `reduced`.
    """

    channels: int
    select: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    color: Literal["srgb", "keep"] = "srgb"
    max_pixels: int = MAX_PIXELS
    display: tuple[int, ...] | None = None
    upright: bool = True
    reduced: bool = False

    @property
    def takes_values(self) -> bool:
        """Whether stored values are measurements instead of colors."""
        return self.select is not None or self.value_range is not None

    def describe(self) -> dict[str, Any]:
        """What pixels depend on, as JSON values."""
        return {
            "channels": self.channels,
            "select": list(self.select) if self.select is not None else None,
            "value_range": list(self.value_range) if self.value_range is not None else None,
            "color": self.color,
            "upright": self.upright,
            **({"decode": "reduced"} if self.reduced else {}),
        }


def as_reading(reading: "Reading | int") -> Reading:
    """A number of channels as the plain way to read them."""
    return Reading(reading) if isinstance(reading, int) else reading


def open_image(
    file: Encoded | str, reading: Reading | int, scale: reduced.Scale | None = None
) -> Picture:
    """Decode an image by the rule at the top of this module.

    Args:
        file: See `Encoded`.
        reading: How, or just the number of channels.
        scale: By how much it will be resized, for `Reading.reduced`; `None`: it is not.

    Returns:
        The picture. Gray as an array has one channel, which `pixels_of` repeats to those asked
        for.

    Raises:
        BrokenImage: With the reason when the file cannot be decoded, whatever it is.
    """
    reading = as_reading(reading)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(file, reading, scale)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"not an image that Pillow can read{_told_apart(file)}") from None
    except Exception as error:
        # Format plugins raise anything: OSError, SyntaxError, RuntimeError, struct.error,
        # TypeError, MemoryError... A file that cannot be decoded never ends a run.
        if isinstance(error, OSError) and is_of_the_machine(error):  # read while it is decoded
            raise MachineFault(first_line(error)) from None
        raise BrokenImage(first_line(error)) from None


def _decode(file: Encoded | str, reading: Reading, scale: reduced.Scale | None) -> Picture:
    if isinstance(file, BrokenImage):
        raise file
    if isinstance(file, np.ndarray):
        return _from_values(arrays.channels_last(file, reading), reading)
    if isinstance(file, Image.Image):
        file.load()
        return _from_pillow(file, reading)
    content = file if isinstance(file, bytes) else read_bytes(file)
    values = arrays.read(content, reading)
    if values is not None:
        return _from_values(values, reading)
    if not reading.reduced:
        plain = plain_jpeg.decode(content, reading.max_pixels)
        if plain is not None:
            return _from_plain(plain, reading)
    image = _open(io.BytesIO(content), reading.max_pixels)
    deep = None if image.mode not in ("RGB", "RGBA") else _deep_color(image, content, reading)
    if deep is not None:
        return _from_deep_color(deep, _profile_of(image, reading), reading)
    may_be_reduced = reading.reduced and not reading.takes_values
    extent = reduced.reduce(image, scale, reading.upright) if may_be_reduced else None
    image.load()
    return reduced.marked(_from_pillow(image, reading), extent)


def _open(stream: Any, max_pixels: int) -> Image.Image:
    """Read an image's header."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # data.max_pixels was raised by the user
    try:
        image = Image.open(stream, formats=known_formats())
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"more pixels than data.max_pixels allows: {error}") from None
    if image.width * image.height > max_pixels:
        raise BrokenImage(
            f"{image.width:,} x {image.height:,} pixels are more than data.max_pixels "
            f"({max_pixels:,}) allows"
        )
    return image


_known: list[str] = []


def known_formats() -> list[str]:
    """Those of `FORMATS` that this installation of Pillow reads; looks for plugins once."""
    if not _known:
        for module, register in _PLUGINS.values():
            with contextlib.suppress(ImportError):
                plugin = importlib.import_module(module)
                if register is not None:
                    getattr(plugin, register)()
        Image.init()
        _known.extend(name for name in FORMATS if name in Image.OPEN)
    return _known


def _told_apart(file: Any) -> str:
    """What an unreadable file is, where that is known."""
    if not isinstance(file, bytes | str | Path):
        return ""
    head = b"?"
    with contextlib.suppress(BrokenImage):
        head = (file if isinstance(file, bytes) else read_bytes(file))[:512]
    return foreign.told_apart(head)


def picture_size(file: Encoded, reading: Reading | int = 3) -> tuple[int, int]:
    """(height, width) of a picture as it is seen, from its header; (0, 0) when it has none.

    A picture with an EXIF orientation of a quarter turn swaps its sides.
    """
    reading = as_reading(reading)
    try:
        if isinstance(file, Image.Image):
            return file.height, file.width
        if isinstance(file, np.ndarray):
            height, width = arrays.channels_last(file, reading).shape[:2]
            return height, width
        if isinstance(file, Path):
            if not file.is_file():  # a pipe must not be opened
                return 0, 0
            with open(file, "rb") as stream:
                head = stream.read(132)
                if not arrays.may_be_array(head):
                    stream.seek(0)
                    return _header_size(stream, reading)
            file = read_bytes(file)
        if not isinstance(file, bytes):
            return 0, 0
        if (shape := arrays.header_shape(file, reading)) is not None:
            return shape
        return _header_size(io.BytesIO(file), reading)
    except Exception:
        # Format plugins raise anything; the encoding pass will say what is wrong.
        return 0, 0


def _header_size(stream: Any, reading: Reading) -> tuple[int, int]:
    with Image.open(stream, formats=known_formats()) as picture:
        width, height = picture.size
        try:
            is_turned = reading.upright and picture.getexif().get(0x0112, 1) >= 5
        except Exception:  # as in decoding: damaged EXIF data turn nothing
            is_turned = False
    return (width, height) if is_turned else (height, width)


def _from_plain(pixels: np.ndarray, reading: Reading) -> Picture:
    """Gray or RGB of 8 bits `(H, W, 1 or 3)`, without a profile or an orientation."""
    if pixels.shape[2] == reading.channels and not reading.takes_values:
        return pixels
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    return _from_pillow(picture, reading)


# -- Pillow's pictures -----------------------------------------------------------------------


def _from_pillow(image: Image.Image, reading: Reading) -> Picture:
    profile = _profile_of(image, reading)
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image = _upright(image) if reading.upright else image
    if image.mode in _INTEGERS or image.mode == "F":
        values = np.asarray(image)[:, :, None]
        pixels = _from_values(values, reading)
        convert = (
            deep_color.conversion(profile, 1) if profile and values.dtype.itemsize == 2 else None
        )
        pixels = pixels if convert is None else convert(values)
        # Of 8 bits, Pillow turns them around itself.
        return np.float32(255.0) - pixels if white_is_zero else pixels
    if profile:
        image = to_srgb(image, profile)
    if reading.select is not None or reading.channels not in (1, 3, 4):
        natural = "RGBA" if _is_transparent(image) else "RGB"
        if image.mode not in ("L", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else natural)
        values = np.asarray(image)
        return _from_values(values[:, :, None] if values.ndim == 2 else values, reading)
    image = _with_channels(image, reading.channels)
    if reading.value_range is None:
        return image
    values = np.asarray(image)
    return _from_values(values[:, :, None] if values.ndim == 2 else values, reading)


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image  # instead of the copy that Pillow gives
        return ImageOps.exif_transpose(image)
    except Exception:
        # Struct errors and the like: the pixels are readable, how they were held is not.
        return image


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    if _is_transparent(image):
        image = image.convert("RGBA")
        if channels < 4:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    elif image.mode not in {"L", "RGB", "1"}:
        image = image.convert("RGB")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


# -- more than 8 bits ------------------------------------------------------------------------


def _deep_color(image: Image.Image, content: bytes, reading: Reading) -> np.ndarray | None:
    """16-bit RGB or RGBA at full precision `(H, W, 3 or 4)` uint16; `None` for other images.

    Pillow keeps the high bytes only. Told that the bytes lie the other way round, it gives the
    low ones.
    """
    if image.format == "PPM":
        return deep_color.of_ppm(content)
    raw = _raw_mode(image)
    if raw is None or deep_color.conversion(_profile_of(image, reading), 3) is None:
        return None
    swapped = raw[:-1] + _OTHER_BYTE_ORDER[raw[-1]]
    image.load()
    low = _open(io.BytesIO(content), reading.max_pixels)
    tiles: list[Any] = low.tile  # type: ignore[attr-defined]
    low.tile = [_with_raw_mode(tile, swapped) for tile in tiles]  # type: ignore[attr-defined]
    low.load()
    parts = [_upright(part) if reading.upright else part for part in (image, low)]
    high_bytes, low_bytes = (np.asarray(part) for part in parts)
    return high_bytes.astype(np.uint16) * 256 + low_bytes


def _raw_mode(image: Image.Image) -> str | None:
    """The name of 16-bit color in an image's file, such as `RGB;16B`; `None` for other pixels."""
    tiles: list[Any] = getattr(image, "tile", None) or []
    names = {tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in tiles}
    name = names.pop() if len(names) == 1 else ""
    if not isinstance(name, str) or name[:-1] not in ("RGB;16", "RGBA;16"):
        return None
    return name


def _with_raw_mode(tile: Any, name: str) -> Any:
    arguments = name if isinstance(tile[3], str) else (name, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _from_deep_color(values: np.ndarray, profile: bytes | None, reading: Reading) -> np.ndarray:
    if reading.takes_values or reading.channels not in (1, 3, 4):
        return _from_values(values, reading)
    convert = deep_color.conversion(profile, 3) or deep_color.as_it_is
    pixels = convert(values[:, :, :3])
    alpha = deep_color.as_it_is(values[:, :, 3:])
    if reading.channels == 4:
        alpha = alpha if alpha.shape[2] else np.full_like(pixels[:, :, :1], 255.0)
        return np.concatenate([pixels, alpha], axis=2)
    if alpha.shape[2]:
        pixels = pixels * (alpha / 255.0) + (255.0 - alpha)
    if reading.channels == 1:
        pixels = (pixels @ _LUMA)[:, :, None]
    return np.ascontiguousarray(pixels)


def _profile_of(image: Image.Image, reading: Reading) -> bytes | None:
    """The embedded color profile, where it matters."""
    if reading.color == "keep" or reading.takes_values:
        return None
    return image.info.get("icc_profile") or None


def _from_values(values: np.ndarray, reading: Reading) -> np.ndarray:
    """Stored values `(H, W, bands)` as pixels in 0..255."""
    if reading.value_range is not None and values.shape[2] == 1 and reading.select is None:
        # One band may be gray for more channels: `pixels_of` repeats it.
        return arrays.to_pixels(values, reading)
    return arrays.to_pixels(arrays.chosen(values, reading), reading)
