"""What lies in a folder: every file listed once, sorted by kind, nothing dropped without a count.

Listing is by `os.scandir` on bytes, which needs no look at the files themselves: a million names
take seconds. Links are followed; a folder that was listed already is not listed again, which ends
loops. Hidden files, and the folders in which storage boxes and systems keep thumbnails and
deleted files, are left out.
"""

import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec

from first_stage.data.files import IMAGE_SUFFIXES, OPTIONAL
from first_stage.files import patiently

JUNK_FOLDERS = frozenset((
    b"@eadir", b"#recycle", b"#snapshot", b"@recycle", b"@recently-snapshot", b"@tmp", b"__macosx",
    b"$recycle.bin", b"system volume information", b"lost+found", b"__pycache__",
))  # fmt: skip
_JUNK_FILES = frozenset((b"thumbs.db", b"desktop.ini", b"picasa.ini"))
_SIDECARS = frozenset((b".txt", b".caption", b".json"))
_METADATA = frozenset((b"metadata.jsonl", b"metadata.csv", b"metadata.parquet"))
_ARCHIVES = frozenset((b".zip", b".gz", b".tgz", b".bz2", b".xz", b".7z", b".rar", b".zst"))
_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\x93NUMPY",
)  # fmt: skip

HIDDEN = "hidden and system files"


@dataclass
class Listing:
    """What lies below a folder; paths are relative to it.

    Attributes:
        root: The folder.
        images: Files whose names or first bytes say that they are images.
        parquet: Parquet files.
        tars: Tar files.
        sidecars: Texts and JSON files, which may say something of an image of the same name.
        metadata: `metadata.jsonl`, `.csv` or `.parquet`.
        left_out: Everything else, by reason.
        followed: How many links were followed out of the folder.
    """

    root: bytes
    images: list[bytes] = field(default_factory=list)
    parquet: list[bytes] = field(default_factory=list)
    tars: list[bytes] = field(default_factory=list)
    sidecars: list[bytes] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    left_out: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    followed: int = 0

    def add(self, name: bytes, path: bytes) -> None:
        """Sort a regular file in by its name; `path` is relative to the root."""
        lower = name.lower()
        dot = lower.rfind(b".")
        suffix = lower[dot:] if dot > 0 else b""
        if name.startswith(b".") or lower in _JUNK_FILES:
            self.left_out[HIDDEN].append(path)
        elif suffix in _SUFFIXES:
            problem = _missing(suffix)
            (self.left_out[problem] if problem else self.images).append(path)
        elif lower in _METADATA:
            self.metadata.append(path)
        elif suffix == b".parquet":
            self.parquet.append(path)
        elif suffix == b".tar":
            self.tars.append(path)
        elif suffix in _SIDECARS:
            self.sidecars.append(path)
        elif suffix in _ARCHIVES:
            self.left_out[f"{suffix.decode()}: unpack them first"].append(path)
        elif _is_image(os.path.join(self.root, path)) if not suffix else False:
            self.images.append(path)
        else:
            kind = suffix.decode("ascii", "backslashreplace")
            self.left_out[f"{kind or 'no suffix'}: no known image format"].append(path)


def _missing(suffix: bytes) -> str | None:
    """What must be installed for a suffix, if anything."""
    if suffix not in OPTIONAL:
        return None
    module, package = OPTIONAL[suffix]
    if find_spec(module) is not None:
        return None
    return f"{suffix.decode()}: pip install {package}"


def _is_image(path: bytes) -> bool:
    """Whether a file without a suffix begins like an image."""
    try:
        head = patiently(lambda: _head(path), repr(os.fsdecode(path)))
    except OSError:
        return False
    return (
        head.startswith(_MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypavif", b"ftypheic")
    )


def _head(path: bytes) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(16)


def list_folder(root: str | os.PathLike[str]) -> Listing:
    """List everything below a folder.

    Args:
        root: The folder.

    Returns:
        What was found, each kind sorted.

    Raises:
        MachineError: When the machine or its network fails to list a folder, several times over: a
            folder that is left out for that would be data that are gone.
    """
    listing = Listing(os.fsencode(root))
    seen: set[tuple[int, int]] = set()
    inside = os.path.realpath(listing.root)
    linked: list[bytes] = []
    _walk(listing, b"", seen, linked, inside)
    while linked:  # after all that lies here itself, so that a link never hides a folder
        folders, linked = sorted(linked), []
        for folder in folders:
            _walk(listing, folder, seen, linked, inside)
    for group in (
        listing.images,
        listing.parquet,
        listing.tars,
        listing.sidecars,
        listing.metadata,
    ):
        group.sort()
    return listing


def _walk(
    listing: Listing, top: bytes, seen: set[tuple[int, int]], linked: list[bytes], inside: bytes
) -> None:
    folders = [top]
    while folders:
        folder = folders.pop()
        absolute = os.path.join(listing.root, folder)
        try:
            what = repr(os.fsdecode(absolute))
            facts = patiently(lambda: os.stat(absolute), what)  # noqa: B023
            if (facts.st_dev, facts.st_ino) in seen:
                listing.left_out["links to folders that are listed already"].append(folder)
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = patiently(lambda: _entries(absolute), what)  # noqa: B023
        except OSError as error:
            listing.left_out[f"folders that cannot be read: {error.strerror}"].append(folder)
            continue
        for name, kind in entries:
            path = os.path.join(folder, name) if folder else name
            if kind == "link":
                _follow(listing, name, path, linked, inside)
            elif kind == "folder":
                if name.startswith(b".") or name.lower() in JUNK_FOLDERS:
                    listing.left_out[HIDDEN].append(path + b"/")
                else:
                    folders.append(path)
            elif kind == "file":
                listing.add(name, path)
            else:
                listing.left_out["no regular files"].append(path)


def _entries(folder: bytes) -> list[tuple[bytes, str]]:
    """Names in a folder and what they are, all or an error."""
    with os.scandir(folder) as entries:
        return [(entry.name, _kind(entry)) for entry in entries]


def _kind(entry: os.DirEntry[bytes]) -> str:
    if entry.is_symlink():
        return "link"
    if entry.is_dir():
        return "folder"
    return "file" if entry.is_file() else "other"


def _follow(listing: Listing, name: bytes, path: bytes, linked: list[bytes], inside: bytes) -> None:
    absolute = os.path.join(listing.root, path)
    try:
        kind = patiently(lambda: os.stat(absolute), repr(os.fsdecode(absolute))).st_mode
    except OSError:
        listing.left_out["links that lead nowhere"].append(path)
        return
    if name.startswith(b".") or name.lower() in JUNK_FOLDERS:
        listing.left_out[HIDDEN].append(path)
        return
    target = os.path.realpath(absolute)
    listing.followed += not (target == inside or target.startswith(inside + b"/"))
    if stat.S_ISDIR(kind):
        linked.append(path)
    elif stat.S_ISREG(kind):
        listing.add(name, path)
    else:
        listing.left_out["no regular files"].append(path)
