"""Files that are whole or not there, and checksums."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from first_stage.errors import UserError

TEMPORARY = ".tmp-"
"""Prefix of what is being written; leftovers with it are never read."""


_DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network's file system",
}


class WriteError(UserError):
    """The disk is full, broken, or not writable."""


@contextlib.contextmanager
def writing(folder: Path, what_is_saved: Callable[[], str]) -> Iterator[None]:
    """Tell a disk that cannot be written in words.

    Args:
        folder: What is being written to, for the message.
        what_is_saved: Says what the user still has, and how to go on.

    Raises:
        WriteError: Instead of the `OSError` of a full, broken or read-only disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        file = f" ({error.filename})" if error.filename else ""
        raise WriteError(_write_problem(folder, error.errno, file, what_is_saved())) from error
    except SafetensorError as error:
        # Its Rust code hides the number of the system's error in the text: "(os error 28)".
        for number in _DISK:
            if f"(os error {number})" in str(error):
                raise WriteError(_write_problem(folder, number, "", what_is_saved())) from error
        raise


def _write_problem(folder: Path, number: int, file: str, saved: str) -> str:
    return f"{folder} cannot be written: {os.strerror(number)}{file}; {_DISK[number]}. {saved}"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Args:
        path: The file. A reader sees what was there before, or the new one, never a part.
        write: Writes a file at the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        write(temporary)
        _sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda p: _write_utf8(p, text))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: For NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, in which each has a step; none when there is no such file.

    A last line that was cut off by a kill is left out.

    Raises:
        UserError: When another line is damaged.
    """
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            float(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if place == len(lines):
                break
            raise UserError(f"line {place} of {str(path)!r} is damaged: {error}") from error
        entries.append(entry)
    return entries


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name beside it, then rename it.

    Args:
        path: The folder; one that is there already is replaced.
        write: Fills the empty folder that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    temporary.mkdir()
    old = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-old-{path.name}")
    try:
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync_file(file)
            else:
                sync_folder(file)
        sync_folder(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for entry in folder.glob(f"{TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is there whole or gone, whenever this is cut off."""
    doomed = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
