"""Which files are images by their names, and how files are opened, here or far away."""

import os
import stat
from pathlib import Path
from typing import Any

from first_stage.data.broken import BrokenImage, MachineFault
from first_stage.files import MachineError, patiently

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
MAX_FILE_BYTES = 2**30
"""A larger file is no image."""


def read_bytes(path: str | Path) -> bytes:
    """A file's content, when it is a regular file of a bounded size.

    Raises:
        BrokenImage: When it is something else, or cannot be read.
        MachineFault: When the machine fails to read it, several times over.
    """
    try:
        return patiently(lambda: _content(path), repr(str(path)))
    except MachineError as error:
        raise MachineFault(str(error)) from None
    except OSError as error:
        raise BrokenImage(f"cannot be read: {error.strerror or error}") from None


def _content(path: str | Path) -> bytes:
    # A pipe must not make us wait for its other end.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            raise BrokenImage("no regular file")
        if facts.st_size > MAX_FILE_BYTES:
            raise BrokenImage(f"a file of {facts.st_size:,} bytes is no image")
        # Of a small file most of the time goes into calls of the system: these are four.
        content = os.read(handle, facts.st_size)
        while len(content) < facts.st_size and (more := os.read(handle, facts.st_size)):
            content += more
        return content
    finally:
        os.close(handle)


def open_url(url: str) -> Any:
    """Open a file for reading bytes: a local path, or a URL that fsspec knows."""
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


def read_range(url: str, begin: int, end: int) -> bytes:
    """Read the bytes from `begin` to before `end`, and of a file far away no others.

    Opened as usual, files on object stores are fetched in blocks of megabytes, ahead of what is
    asked for: for samples here and there that is many times what they hold.
    """
    if "://" not in url:
        with open(url, "rb") as handle:
            handle.seek(begin)
            return handle.read(end - begin)
    import fsspec

    system, place = fsspec.url_to_fs(url)
    plain = fsspec.AbstractFileSystem.cat_file  # which opens the file as usual
    if getattr(system.cat_file, "__func__", None) is not plain:
        return bytes(system.cat_file(place, start=begin, end=end))
    with system.open(place, "rb", cache_type="none") as handle:
        handle.seek(begin)
        return bytes(handle.read(end - begin))


def size_of_url(url: str) -> int:
    """A file's bytes."""
    if "://" not in url:
        return Path(url).stat().st_size
    import fsspec

    system, place = fsspec.url_to_fs(url)
    return int(system.size(place) or 0)
