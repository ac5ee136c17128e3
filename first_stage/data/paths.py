"""Many paths in one buffer: what a folder of millions of files costs to hold and to share.

A list of Python strings costs 100 bytes a path, and forked workers copy its pages as they count
references. Here a path costs its own length and 9 bytes, and workers share them.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

_END = b"\n"


class Paths:
    """An ordered list of paths as bytes, as the file system gives them.

    Args:
        names: The paths.
    """

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        lengths = np.fromiter((len(name) for name in names), np.int64, len(names))
        self._ends = np.cumsum(lengths + 1)
        self._buffer = np.frombuffer(_END.join([*names, b""]), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._buffer[start : int(self._ends[index]) - 1].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        whole, start = self._buffer.tobytes(), 0
        for end in self._ends.tolist():
            yield whole[start : end - 1]
            start = end

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self._buffer.nbytes + self._ends.nbytes)

    def text(self, index: int) -> str:
        """A path for people and for files of text."""
        return shown(self[index])

    def texts(self) -> pa.Array:
        """All of them, as `text` gives them."""
        data = np.delete(self._buffer, self._ends - 1)
        offsets = np.concatenate([[0], self._ends - np.arange(1, len(self) + 1)])
        kind = pa.large_string() if len(data) >= 2**31 else pa.string()
        wide = np.int64 if kind == pa.large_string() else np.int32
        found = pa.Array.from_buffers(
            kind, len(self), [None, pa.py_buffer(offsets.astype(wide)), pa.py_buffer(data)]
        )
        try:
            found.validate(full=True)
        except pa.ArrowInvalid:  # some name is not UTF-8
            return pa.array([shown(name) for name in self], kind)
        return found

    def digest(self) -> "hashlib._Hash":
        """SHA-256 over all paths, each with a newline behind it."""
        return hashlib.sha256(self._buffer.data)


def shown(name: bytes) -> str:
    r"""A path as text; bytes that are not UTF-8 are escaped, as in `caf\xe9.png`."""
    return name.decode("utf-8", "backslashreplace")
