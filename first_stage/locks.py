"""Locks on files that end with the process that holds them, however it dies."""

import contextlib
import errno
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such thing
    fcntl = None  # type: ignore[assignment]


class RecordLock:
    """A record lock of the operating system on a file, in which its holder writes its name.

    It belongs to the process: unlike with `flock`, what the process forks, such as workers that
    decode images, does not hold the lock any longer than it lives itself. Where the system or the
    file system has no locks, nobody is kept off.

    Args:
        path: The file; it is made when it is not there.

    Attributes:
        is_held: Whether `take` got it; false where there are no locks.

    Raises:
        OSError: When it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self.is_held = False
        self._file: IO[str] = path.open("a+", encoding="utf-8", errors="replace")

    def take(self) -> str | None:
        """Take the lock alone.

        Returns:
            The name of another process that holds it; `None` when it is taken.
        """
        if fcntl is None:
            return None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return None
            self._file.seek(0)
            return self._file.read(200).strip() or "unknown"
        self.is_held = True
        with contextlib.suppress(OSError):  # a full disk is told where something is lost by it
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        return None

    def share(self) -> None:
        """Hold the lock together with other processes, as far as nobody holds it alone."""
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> "RecordLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # its name, when the disk is full
            self._file.close()
