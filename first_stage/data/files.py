"""Which files are images by their names, and how files are opened, here or far away."""

from pathlib import Path
from typing import Any

_PLAIN = (
    *("avif", "bmp", "dib", "gif", "jfif", "jp2", "j2k", "jpe", "jpeg", "jpg", "pbm"),
    *("pgm", "png", "pnm", "ppm", "qoi", "tga", "tif", "tiff", "webp", "npy", "npz"),
)
_OPTIONAL = {
    "heic": ("pillow_heif", "pillow-heif"),
    "heif": ("pillow_heif", "pillow-heif"),
    "jxl": ("pillow_jxl", "pillow-jxl-plugin"),
    "dcm": ("pydicom", "pydicom"),
}
IMAGE_SUFFIXES = frozenset(f".{name}" for name in (*_PLAIN, *_OPTIONAL))
"""Suffixes of files that may be images, in lower case."""
OPTIONAL = {f".{name}".encode(): needed for name, needed in _OPTIONAL.items()}
"""Those that need a package: the module, and what to install."""


def open_url(url: str) -> Any:
    """Open a file for reading bytes: a local path, or a URL that fsspec knows."""
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


def size_of_url(url: str) -> int:
    """A file's bytes."""
    if "://" not in url:
        return Path(url).stat().st_size
    import fsspec

    system, place = fsspec.url_to_fs(url)
    return int(system.size(place) or 0)
