"""A cache's files: written atomically, read with errors that name them; and the launch's lock."""

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from first_stage.errors import UserError
from first_stage.files import write_atomic


class CacheError(UserError):
    """A latent cache cannot be made, continued or read as asked."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees the old file or the new one."""
    write_atomic(path, lambda temporary: _write(temporary, content))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file atomically; NaN and infinity are refused rather than written as such."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CacheError: When it is missing or damaged, naming it.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"{str(path)!r} cannot be read: {error}") from error


class LaunchLock:
    """Keeps a second launch off a cache that one is still filling.

    A record lock of the operating system: it ends with the process, however that dies, and, unlike
    `flock`, decode workers forked from the process do not hold it on. The first process of a launch
    takes it alone, then all of its processes share it.

    Args:
        folder: The cache.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = self.path.open("a+")

    def take(self) -> None:
        """Take the lock alone; then share it with the other processes of this launch.

        Raises:
            CacheError: Naming the launch that holds it.
        """
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise CacheError(
                f"another launch ({holder}) is still filling {str(self.path.parent)!r}: wait for "
                "it or end it, then start this command again"
            ) from None
        except OSError:
            return  # a file system without locks; commits are atomic, so the worst is double work
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        self.share()

    def share(self) -> None:
        """Hold the lock together with the launch's other processes."""
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return

    def __enter__(self) -> "LaunchLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
