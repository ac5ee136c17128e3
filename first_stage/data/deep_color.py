"""Embedded color profiles of images with 16 bits a value, converted to sRGB at that precision.

The library behind Pillow's `ImageCms` takes 8 bits of color. Profiles of curves and a matrix, which
cameras, screens and working spaces have (ICC.1:2022, annex F.3), are a short computation; those of
tables, which printers have, go through 8 bits.
"""

import functools
import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import ImageCms

Conversion = Callable[[np.ndarray], np.ndarray]
"""From 16-bit values `(H, W, 1 or 3)` to sRGB in 0..255, float32."""
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PPM = re.compile(
    _GAP.join((rb"P6", rb"(\d{1,9})", rb"(\d{1,9})", rb"(\d{1,5})")) + rb"\s", re.DOTALL
)
_TABLES = (b"A2B0", b"A2B1", b"D2B0", b"D2B1")
_SRGB = np.array([
    [0.4360747, 0.3850649, 0.1430804],
    [0.2225045, 0.7168786, 0.0606169],
    [0.0139322, 0.0971045, 0.7141733],
])  # fmt: skip
"""From linear sRGB to XYZ, adapted to the profiles' white (D50)."""


def as_it_is(values: np.ndarray) -> np.ndarray:
    """16-bit values in 0..255."""
    return values.astype(np.float32) / np.float32(257.0)


def of_ppm(content: bytes) -> np.ndarray | None:
    """Colors of a binary PPM file of more than 8 bits, of which Pillow keeps 8.

    Returns:
        `(H, W, 3)` uint16, scaled to 0..65535; `None` for other files.
    """
    head = _PPM.match(content)
    if head is None or not 255 < (largest := int(head[3])) < 65536:
        return None
    width, height = int(head[1]), int(head[2])
    values = np.frombuffer(content, ">u2", 3 * width * height, head.end()).astype(np.float32)
    scaled = np.minimum(values * np.float32(65535 / largest), 65535).round()
    return scaled.astype(np.uint16).reshape(height, width, 3)


@functools.lru_cache(maxsize=32)
def conversion(profile: bytes | None, bands: int) -> Conversion | None:
    """How values of a profile become sRGB.

    Args:
        profile: The ICC profile, if any.
        bands: 1 or 3.

    Returns:
        The conversion, which leaves values as they are where `to_srgb` does (no profile, sRGB,
        damaged, or of another color space); `None` where only 8 bits can be converted.
    """
    if profile is None:
        return as_it_is
    try:
        facts = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = facts.profile.xcolor_space.strip()
        if space != {1: "GRAY", 3: "RGB"}[bands]:
            return as_it_is
        if "srgb" in ImageCms.getProfileDescription(facts).lower().replace(" ", ""):
            return as_it_is
    except Exception:  # damaged
        return as_it_is
    try:
        return _computed(_tags(profile), bands, is_lab=profile[20:24] == b"Lab ")
    except (KeyError, ValueError, struct.error):
        return None


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", profile, 128)
    tags = {}
    for number in range(min(count, 200)):
        name, start, size = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        tags[name] = profile[start : start + size]
    return tags


def _computed(tags: dict[bytes, bytes], bands: int, is_lab: bool) -> Conversion | None:
    if any(name in tags for name in _TABLES):
        return None
    if bands == 1:
        gray = _curve(tags[b"kTRC"])
        linear = _luminance(gray) if is_lab else gray
        table = (_encoded(linear) * 255).astype(np.float32)
        return lambda values: table[values]
    if is_lab:
        return None
    curves = [_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]
    primaries = np.stack([_xyz(tags[name]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")], axis=1)
    matrix = (np.linalg.inv(_SRGB) @ primaries).astype(np.float32)

    def convert(values: np.ndarray) -> np.ndarray:
        linear = np.stack([curve[values[:, :, k]] for k, curve in enumerate(curves)], axis=2)
        return (_encoded(linear @ matrix.T) * 255).astype(np.float32, copy=False)

    return convert


def _xyz(tag: bytes) -> np.ndarray:
    return np.array(struct.unpack_from(">3i", tag, 8)) / 65536


def _curve(tag: bytes) -> np.ndarray:
    """A tone curve (`curv` or `para`) at all 16-bit values: `(65536,)` float32 in [0, 1]."""
    x = np.linspace(0, 1, 65536)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        entries = np.frombuffer(tag, ">u2", count, 12).astype(np.float64)
        if count == 0:
            y = x
        elif count == 1:
            y = x ** (entries[0] / 256)
        else:
            y = np.interp(x, np.linspace(0, 1, count), entries / 65535)
    elif tag[:4] == b"para":
        y = _parametric(x, tag)
    else:
        raise ValueError("no curve")
    if not np.isfinite(y).all():
        raise ValueError("no curve")
    return np.clip(y, 0, 1).astype(np.float32)


def _parametric(x: np.ndarray, tag: bytes) -> np.ndarray:
    """ICC.1:2022, table 68."""
    (kind,) = struct.unpack_from(">H", tag, 8)
    count = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}[kind]
    given = [value / 65536 for value in struct.unpack_from(f">{count}i", tag, 12)]
    g, a, b, c, d, e, f = given + [0.0] * (7 - count)
    if kind == 0:
        return x**g
    if kind in (1, 2):
        return np.where(x >= -b / a, np.maximum(a * x + b, 0) ** g, 0) + (c if kind == 2 else 0)
    return np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)


def _luminance(lightness: np.ndarray) -> np.ndarray:
    """Y of L* in [0, 1] (CIE 1976)."""
    t = (lightness * 100 + 16) / 116
    return np.where(t > 6 / 29, t**3, (t - 4 / 29) * 3 * (6 / 29) ** 2)


def _encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light as sRGB values in [0, 1] (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
