"""Reads files out of a Qt resource file (`.rcc`), in which Qt programs ship their pictures.

The format is that of Qt's resource compiler: a header (`qres`, a version, and where tree, data and
names begin), a tree of fixed-size nodes, names in UTF-16, and data with their length in front. All
numbers are big-endian.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from first_stage.errors import DataError

_COMPRESSED, _FOLDER, _ZSTD = 1, 2, 4
"""Flags of a node."""


def read_resources(file: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a resource file.

    Args:
        file: The `.rcc` file.

    Yields:
        Path inside the file, with `/` between its parts, and content. Content that was compressed
        with zstd, which Qt uses for text but hardly ever for pictures, is left out.

    Raises:
        DataError: When it is no resource file, or is damaged.
    """
    content = file.read_bytes()
    if content[:4] != b"qres":
        raise DataError(f"{str(file)!r} is not a Qt resource file")
    try:
        yield from _walk(content)
    except (struct.error, zlib.error, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{str(file)!r} is damaged: {error}") from error


def _walk(content: bytes) -> Iterator[tuple[str, bytes]]:
    version, tree, data, names = struct.unpack_from(">IIII", content, 4)
    node_size = 14 if version < 2 else 22  # since version 2 with the time of the last change

    def name(offset: int) -> str:
        """A length, a hash, and so many UTF-16 characters."""
        (length,) = struct.unpack_from(">H", content, names + offset)
        start = names + offset + 6
        return content[start : start + 2 * length].decode("utf-16-be")

    def files(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        """The files below a node."""
        at = tree + index * node_size
        named, flags = struct.unpack_from(">IH", content, at)
        path = f"{folder}/{name(named)}" if index else ""
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", content, at + 6)
            for child in range(first, first + count):
                yield from files(child, path)
        elif not flags & _ZSTD:
            start = data + struct.unpack_from(">I", content, at + 10)[0]
            (length,) = struct.unpack_from(">I", content, start)
            stored = content[start + 4 : start + 4 + length]
            # Compressed content begins with its uncompressed length.
            yield path.lstrip("/"), zlib.decompress(stored[4:]) if flags & _COMPRESSED else stored

    yield from files(0, "")
