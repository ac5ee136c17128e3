"""What all writers share."""

import io
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from first_stage.files import TEMPORARY, sync_folder


class Writer(Protocol):
    """Writes a cache in one format, a unit at a time."""

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write the samples of a unit so that they survive a power cut; again after a kill.

        Args:
            unit: The unit's number.
            places: Its samples' places in the cache.
        """
        ...

    def finish(self) -> None:
        """Write what depends on all samples, once every unit is written."""
        ...


class SmallFiles:
    """Many small files, each whole or not there, on the disk when `sync` returns.

    Syncing each file as it is written would wait for the disk once per sample; here the disk has
    the whole unit to catch up.
    """

    def __init__(self) -> None:
        self._written: list[Path] = []

    def put(self, path: Path, content: bytes) -> None:
        """Write a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._written.append(path)

    def sync(self) -> None:
        """Wait until the files are on the disk."""
        for path in self._written:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        for folder in sorted({path.parent for path in self._written}):
            sync_folder(folder)
        self._written = []


def npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    """The bytes of an .npz file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()
