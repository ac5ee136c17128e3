"""A cache's files: written atomically, read with errors that name them; and the launch's lock."""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from first_stage.errors import UserError
from first_stage.files import write_atomic


class CacheError(UserError):
    """A latent cache cannot be made, continued or read as asked."""


Result = TypeVar("Result")

_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip
_PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds before each further try. A network's file system that changes servers is back in less."""


class MachineError(CacheError):
    """The machine, its disk or its network failed several times over: not the file's fault."""


def is_of_the_machine(error: OSError) -> bool:
    """Whether an error (a stale handle, a failing disk, no memory) says nothing about the file.

    Pillow raises an `OSError` without a number for what it cannot decode: that is the file's.
    """
    return error.errno is not None and error.errno not in _OF_THE_FILE


def patiently(read: Callable[[], Result], what: str) -> Result:
    """Call again after errors of the machine, with growing pauses.

    Args:
        read: What may fail.
        what: What it reads, for the message.

    Returns:
        What the call returns.

    Raises:
        MachineError: When the machine fails every time.
        OSError: At once, for an error of the file.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            if pause is None:
                raise MachineError(
                    f"{what} cannot be read: {error.strerror}, {len(_PAUSES) + 1} times over "
                    f"{sum(_PAUSES):.0f} s. That is the machine or its network; what is encoded "
                    "stays: start the same command again when it is well"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


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
        return json.loads(patiently(path.read_text, repr(str(path))))
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
        self.is_held = False

    def take(self) -> None:
        """Take the lock alone; then share it with the other processes of this launch.

        Where the file system has no locks, `is_held` stays false: commits are atomic, so the worst
        that two launches with the same options can do there is work twice.

        Raises:
            CacheError: Naming the launch that holds it.
        """
        self._take_alone()
        if self.is_held:
            self.share()

    def take_alone(self) -> None:
        """Take the lock and share it with nobody, for what must not run beside a launch.

        Raises:
            CacheError: Naming the launch that holds it, or when the file system has no locks.
        """
        self._take_alone()
        if not self.is_held:
            raise CacheError(
                f"the file system of {str(self.path.parent)!r} gives no locks, so whether a launch "
                "is still filling it cannot be known: when none is, delete the files by hand"
            )

    def _take_alone(self) -> None:
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise CacheError(
                f"another launch ({holder}), or gc, is still at {str(self.path.parent)!r}: wait "
                "for it or end it, then start this command again"
            ) from None
        except OSError:
            return
        self.is_held = True
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

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
