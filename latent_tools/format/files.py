"""A cache's files: written atomically, read with errors that name them; and the launch's lock."""

import json
from pathlib import Path
from typing import Any

from first_stage.errors import UserError
from first_stage.files import patiently, write_atomic
from first_stage.locks import RecordLock


class CacheError(UserError):
    """A latent cache cannot be made, continued or read as asked."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a run after a kill, sees the old file or the new one."""
    write_atomic(path, lambda temporary: _write(temporary, content))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CacheError: When it is missing or damaged, naming it.
    """
    try:
        return json.loads(patiently(path.read_text, repr(str(path))))
    except (OSError, ValueError) as error:
        raise CacheError(f"{str(path)!r} cannot be read: {error}") from error


class LaunchLock(RecordLock):
    """Keeps a second launch off a cache that one is still filling.

    The first process of a launch takes it alone, then all of its processes share it.

    Args:
        folder: The cache.
    """

    def __init__(self, folder: Path):
        super().__init__(folder / ".lock")

    def take(self) -> None:
        """Take the lock alone; then share it with the other processes of this launch.

        Where the file system has no locks, `is_held` stays false: commits are atomic, so the worst
        that two launches with the same options can do there is work twice.

        Raises:
            CacheError: Naming the launch that holds it.
        """
        self._take_alone()
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
        if holder := super().take():
            raise CacheError(
                f"another launch ({holder}), or gc, is still at {str(self.path.parent)!r}: wait "
                "for it or end it, then start this command again"
            )
