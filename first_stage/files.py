"""Files and folders that are whole or not there, and checksums."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from first_stage.errors import DISK_REMEDIES, ConfigError, UserError

FILE_LIST = "files.txt"
"""What a folder calls the list of the data files that were read, and of those left out and why."""
TEMPORARY = ".tmp-"
"""Prefix of what is being written; leftovers with it are never read."""
_OLD = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]{8}-old-(.+)", re.DOTALL)
"""What a folder is called between two renames while another one takes its place."""
_AT_FOLDER, _EXCHANGE = -100, 2
"""The kernel's AT_FDCWD and RENAME_EXCHANGE."""

_DISK = DISK_REMEDIES | {errno.EACCES: "make it writable", errno.EPERM: "make it writable"}


Result = TypeVar("Result")

_OF_THE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip
_PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds before each further try. A network's file system that changes servers is back in less."""


class MachineError(UserError):
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
                    f"{sum(_PAUSES):.0f} s. That is the machine or its network: "
                    "start the same command again when it is well, it goes on"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


class WriteError(UserError):
    """The disk is full, broken, or not writable."""


@contextlib.contextmanager
def writing(folder: Path | None, what_is_saved: Callable[[], str]) -> Iterator[None]:
    """Tell a disk that cannot be written in words.

    Args:
        folder: What is being written to, for the message; `None` where only the error knows.
        what_is_saved: Says what the user still has, and how to go on.

    Raises:
        WriteError: Instead of the `OSError` of a full, broken or read-only disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        if folder is None:
            folder = Path(error.filename or "the disk")
        file = f" ({error.filename})" if error.filename not in (None, str(folder)) else ""
        raise WriteError(_write_problem(folder, error.errno, file, what_is_saved())) from error
    except SafetensorError as error:
        # Its Rust code hides the number of the system's error in the text: "(os error 28)".
        for number in _DISK:
            if f"(os error {number})" in str(error):
                where = folder or Path("the disk")
                raise WriteError(_write_problem(where, number, "", what_is_saved())) from error
        raise


def make_writable(folder: Path, told: str) -> None:
    """Make a folder, and find out before the long work whether its results can be written there.

    Args:
        folder: The folder; it may be there already.
        told: The field and the value that named it, for the message.

    Raises:
        ConfigError: When nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # What exists where a folder should be is a file.
        number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
        reason = error if number is None else os.strerror(number)
        raise ConfigError(
            f"{told} cannot be written: {reason}; name a folder that can be, new or old"
        ) from error


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
    temporary = _temporary(path)
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
    """Write a folder under a temporary name beside it, then put it in its place.

    Whenever this is cut off, the old folder or the new one is whole at `path`, or, on file systems
    that cannot exchange two names in one step, the old one waits where `standing` finds it and
    `remove_leftovers` puts it back.

    Args:
        path: The folder; one that is there already is replaced. A link is replaced, not what it
            leads to.
        write: Fills the empty folder that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync_file(file)
            else:
                sync_folder(file)
        sync_folder(temporary)
        _put_in_place(temporary, path)
    finally:
        remove(temporary)
    sync_folder(path.parent)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a folder; what was at `path` is then at `new`, or gone."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    if _exchange(new, path):
        return
    old = _temporary(path, "old-")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)  # where this fails too, the old folder waits under its other name
        raise
    remove_folder(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; whether the system and the file system can."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return renameat2(_AT_FOLDER, names[0], _AT_FOLDER, names[1], _EXCHANGE) == 0


def standing(path: Path) -> Path:
    """Where a folder lies that `write_folder` may have been cut off replacing.

    Args:
        path: Its place.

    Returns:
        `path`, or where the old folder waits while nothing is there.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return path
    waiting = [entry for entry in path.parent.iterdir() if _waits_for(entry) == path]
    return max(waiting, key=lambda entry: entry.stat().st_mtime_ns, default=path)


def remove_leftovers(folder: Path) -> None:
    """Put back what killed writers moved out of the way, and remove what else they left.

    Args:
        folder: One that nobody is writing into.
    """
    for place in {_waits_for(entry) for entry in folder.glob(f"{TEMPORARY}*-old-*")}:
        if place is not None and (found := standing(place)) != place:
            os.rename(found, place)
    for entry in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            remove(entry) if _waits_for(entry) is None else remove_folder(entry)


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one, so that it is there whole or gone."""
    doomed = _temporary(path)
    os.rename(path, doomed)
    with contextlib.suppress(OSError):
        remove(doomed)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path, mark: str = "") -> Path:
    return path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{mark}{path.name}")


def _waits_for(entry: Path) -> Path | None:
    """The place of a folder that waits under its other name; `None` for other entries."""
    match = _OLD.fullmatch(entry.name)
    return entry.with_name(match[1]) if match else None


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
