"""Splits read from the names of files and folders, as `datasets` reads them."""

import re
from collections.abc import Sequence

from first_stage.errors import DataError

NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What a part of a name says."""
_PARTS = re.compile(r"[^a-z0-9]+")


def shard_splits(paths: Sequence[bytes]) -> list[str | None]:
    """The split that each shard's name says, its folders' where its own does not."""
    return [_of_path(path.decode("utf-8", "replace").lower()) for path in paths]


def _of_path(path: str) -> str | None:
    for part in reversed(path.split("/")):
        found = {NAMES[word] for word in _PARTS.split(part) if word in NAMES}
        if len(found) == 1:
            return found.pop()
    return None


def folder_splits(paths: Sequence[bytes]) -> tuple[dict[bytes, str], bytes]:
    """Folders of images that are splits: `train/` beside `val/`, or one that holds everything.

    Args:
        paths: Of the images, sorted.

    Returns:
        The split of each such folder's prefix, `b"train/"`; and the prefix that all images share
        before it. Empty when the folders are no splits: one that is named like a split among
        others is a class.
    """
    shared = b""
    while True:
        tops = {_top(path[len(shared) :]) for path in paths}
        named = {top: NAMES.get(top.decode("utf-8", "replace").lower()) for top in tops if top}
        splits = {split for split in named.values() if split}
        if splits and (len(splits) > 1 or (b"" not in tops and None not in named.values())):
            return {shared + t + b"/": split for t, split in named.items() if split}, shared
        if len(tops) != 1 or b"" in tops:
            return {}, b""
        shared += tops.pop() + b"/"


def _top(path: bytes) -> bytes:
    """The first folder of a path; empty for a file without one."""
    return path.split(b"/", 1)[0] if b"/" in path else b""


def class_folders(paths: Sequence[bytes], prefixes: Sequence[bytes]) -> tuple[bytes, ...]:
    """Names of the folders right below those of splits, of whichever split."""
    rest = (path[len(p) :] for path in paths for p in prefixes if path.startswith(p))
    return tuple(sorted({top for top in map(_top, rest) if top}))


def choose(path: str, split: str | None, there: Sequence[str], is_explicit: bool) -> str | None:
    """Which split is read.

    Args:
        path: The data, for messages.
        split: The one asked for; `None`: the only one, `all`: all of them.
        there: The splits that names say.
        is_explicit: Whether the files were named one by one or by a pattern.

    Returns:
        The split, or `None` for everything.

    Raises:
        DataError: When it is not there, or several are and none was named.
    """
    found = ", ".join(there)
    if split == "all":
        return None
    if not there:
        if split in (None, "train"):
            return None
        raise DataError(
            f"data.split is {split!r}, but nothing in {path!r} is named after a split: leave "
            "data.split out to read all of it"
        )
    if is_explicit and len(there) == 1:
        return None
    wanted = NAMES.get(split, split) if split is not None else None
    if wanted in there:
        return wanted
    if wanted is None:
        if len(there) == 1:
            return there[0]
        raise DataError(f"{path!r} has the splits {found}: say which with data.split, or all")
    raise DataError(f"data.split is {split!r}, but {path!r} has the splits: {found}")
