"""One inventory for training, evaluation and cache: which files are the data set, and which not.

The choice is never silent. Everything that is left out is counted by its reason, and what cannot be
decided is refused with what to give instead.
"""

import codecs
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from first_stage.data import builtin, splits
from first_stage.data.listing import HIDDEN, Listing, list_folder
from first_stage.data.paths import Paths, shown
from first_stage.errors import DataError
from first_stage.files import write_atomic

Kind = Literal["builtin", "hub", "saved", "images", "parquet", "tar"]
_LISTS = (".txt", ".lst", ".list")
_MANY = 10
"""So many images for each shard, or so many shards for each image, are the data set."""
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SIDECAR_KINDS = {b".txt": "caption", b".caption": "caption", b".json": "json"}


@dataclass
class Inventory:
    """The files of a data set.

    Attributes:
        path: As it was given.
        kind: What they are.
        root: The folder that the files' paths are relative to.
        files: Images or shards.
        left_out: Files that are not read, by reason.
        remarks: What else should be known.
        split: The split that was read, `None` for everything.
        splits: The splits that names say.
        prefixes: What comes before the class folders: a split's folder, or a root of several.
        class_folders: Names of the class folders of all splits, where folders are splits.
        sidecars: Files beside images, of the same name: captions and JSON.
        metadata: Files that say something of many images.
    """

    path: str
    kind: Kind
    root: bytes = b""
    files: Paths = field(default_factory=lambda: Paths([]))
    left_out: dict[str, Paths] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    split: str | None = None
    splits: tuple[str, ...] = ()
    prefixes: tuple[bytes, ...] = ()
    class_folders: tuple[bytes, ...] = ()
    sidecars: Paths = field(default_factory=lambda: Paths([]))
    metadata: Paths = field(default_factory=lambda: Paths([]))

    def __len__(self) -> int:
        return len(self.files)

    def id(self, index: int) -> str:
        """A file's path below the root, as text."""
        return self.files.text(index)

    def full(self, index: int) -> bytes:
        """A file's path."""
        return os.path.join(self.root, self.files[index])

    def lines(self) -> Iterator[str]:
        """What was found and what not, for people."""
        if self.kind in ("images", "parquet", "tar"):
            what = {"images": "image", "parquet": "parquet file", "tar": "tar file"}[self.kind]
            of_split = f" of the split {self.split}" if self.split else ""
            yield f"{self.path}: {_counted(len(self), what)}{of_split}"
        for reason, paths in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            if reason != HIDDEN:
                example = f", such as {paths.text(0)}" if len(paths) else ""
                yield f"  left out: {len(paths):,} {reason}{example}"
        if HIDDEN in self.left_out:
            yield f"  left out: {len(self.left_out[HIDDEN]):,} {HIDDEN}"
        yield from (f"  {remark}" for remark in self.remarks)

    def write(self, path: Path) -> None:
        """Write every file and every one left out, with its reason, as lines of text."""

        def fill(place: Path) -> None:
            with place.open("w", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in self.lines())
                stream.writelines(f"+ {shown(name)}\n" for name in self.files)
                for reason, paths in self.left_out.items():
                    stream.writelines(f"- {shown(name)}\t{reason}\n" for name in paths)

        write_atomic(path, fill)


def take_inventory(path: str, split: str | None = None) -> Inventory:
    """Find out what is at a path.

    Args:
        path: A folder (searched to its bottom), a parquet or tar file, a text file that lists
            images, a pattern (`dir/*.tar`, `{a,b}`, `{000..123}.tar`), several of these as
            `[one, other]`, a folder written by `save_to_disk`, a built-in set, or a hub id.
        split: Which split, where names say splits; `all`: every one; `None`: the only one.

    Returns:
        The inventory; of built-in sets, saved and hub data sets it only says that they are such.

    Raises:
        DataError: When nothing is there, or what is there cannot be told.
    """
    if path in builtin.NAMES and not Path(path).exists():
        return Inventory(path, "builtin")
    if not path.strip():
        raise DataError("data.path is empty: give a folder of images, a hub id, photos or digits")
    places = _expanded(path)
    if places == [path] and not Path(path).exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((".tar",)):
            raise DataError(f"data.path {path!r} does not exist")
        return Inventory(path, "hub")
    if len(places) == 1 and (Path(places[0]) / "state.json").exists():
        return Inventory(path, "saved")
    if len(places) == 1 and (Path(places[0]) / "dataset_dict.json").exists():
        return Inventory(path, "saved")
    listing, prefixes, is_explicit = _listed(path, places)
    return _chosen(path, listing, split, prefixes, is_explicit)


# -- what a path says ------------------------------------------------------------------------


def _expanded(path: str) -> list[str]:
    """The places that a path names: a list, a pattern, braces, or itself."""
    if Path(path).exists():
        return [path]
    if path.startswith("[") and path.endswith("]"):
        parts = [part.strip().strip("'\"") for part in path[1:-1].split(",")]
        return [place for part in parts if part for place in _existing(part, path)]
    return _existing(path, path)


def _existing(part: str, whole: str) -> list[str]:
    part = os.path.expanduser(part)
    if not any(mark in part for mark in "*?[{"):
        if part != whole and not Path(part).exists():
            raise DataError(f"data.path names {part!r}, which does not exist")
        return [part]
    found = []
    for pattern in _without_braces(part):
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"data.path {whole!r}: nothing matches {pattern!r}")
        found += matches
    return found


def _without_braces(text: str) -> list[str]:
    if numbers := _NUMBERS.search(text):
        first, last = numbers[1], numbers[2]
        words = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        span = numbers.span()
    elif (choice := re.search(r"\{([^{}]*,[^{}]*)\}", text)) is not None:
        words, span = choice[1].split(","), choice.span()
    else:
        return [text]
    before, after = text[: span[0]], text[span[1] :]
    return [whole for word in words for whole in _without_braces(before + word + after)]


def _listed(path: str, places: Sequence[str]) -> tuple[Listing, tuple[bytes, ...], bool]:
    """Everything at these places, relative to the folder that they share."""
    if len(places) == 1 and Path(places[0]).is_dir():
        return list_folder(places[0]), (), False
    if len(places) == 1 and Path(places[0]).suffix.lower() in _LISTS:
        return _from_list(Path(places[0])), (), True
    folders = [p if Path(p).is_dir() else os.path.dirname(p) or "." for p in places]
    root = os.fsencode(os.path.commonpath([os.path.abspath(f) for f in folders]))
    listing, prefixes = Listing(root), []
    for place in places:
        name = os.path.relpath(os.fsencode(os.path.abspath(place)), root)
        if not os.path.isdir(place):
            listing.add(os.path.basename(name), name)
            continue
        part = list_folder(place)
        prefix = b"" if name == b"." else name + b"/"
        prefixes.append(prefix)
        for group in ("images", "parquet", "tars", "sidecars", "metadata"):
            getattr(listing, group).extend(prefix + p for p in getattr(part, group))
        for reason, paths in part.left_out.items():
            listing.left_out[reason] += [prefix + p for p in paths]
        listing.followed += part.followed
    for group in ("images", "parquet", "tars", "sidecars", "metadata"):  # places may overlap
        setattr(listing, group, sorted(set(getattr(listing, group))))
    return listing, tuple(prefixes), True


def _from_list(file: Path) -> Listing:
    """The images that a text file names, one a line, relative to its own folder."""
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = [line.strip() for line in content.splitlines()]
    folder = os.path.abspath(os.fsencode(file.parent))
    named = [os.path.normpath(os.path.join(folder, line)) for line in lines if line]
    if not named:
        raise DataError(f"data.path {str(file)!r} lists no files")
    root = os.path.commonpath([folder, *(os.path.dirname(name) for name in named)])
    listing = Listing(root)
    for name in dict.fromkeys(named):
        relative = os.path.relpath(name, root)
        if os.path.isfile(name):
            listing.add(os.path.basename(name), relative)
        else:
            listing.left_out["listed files that are not there"].append(relative)
    return listing


# -- what the data set is --------------------------------------------------------------------


def _chosen(
    path: str,
    listing: Listing,
    split: str | None,
    prefixes: tuple[bytes, ...],
    is_explicit: bool,
) -> Inventory:
    kind = _kind(path, listing)
    inventory = Inventory(path, kind, listing.root, prefixes=prefixes)
    left_out = {reason: list(paths) for reason, paths in listing.left_out.items() if paths}
    if listing.followed:
        inventory.remarks.append(f"{_counted(listing.followed, 'link')} out of the folder followed")
    if kind == "images":
        files = _images_of_split(inventory, listing, split, is_explicit, left_out)
    else:
        shards = listing.tars if kind == "tar" else listing.parquet
        files = _shards_of_split(inventory, shards, split, is_explicit, left_out)
        other = listing.parquet if kind == "tar" else listing.tars
        what = "parquet files, of tar files beside them" if kind == "tar" else "tar files"
        _put(left_out, f"{what}", other)
        _put(left_out, "images beside shards", listing.images)
        _put(left_out, "texts and JSON files beside shards", listing.sidecars + listing.metadata)
    inventory.files = Paths(files)
    inventory.left_out = {reason: Paths(paths) for reason, paths in left_out.items() if paths}
    return inventory


def _put(left_out: dict[str, list[bytes]], reason: str, paths: Sequence[bytes]) -> None:
    if paths:
        left_out.setdefault(reason, []).extend(paths)


def _kind(path: str, listing: Listing) -> Literal["images", "parquet", "tar"]:
    images, tars = len(listing.images), len(listing.tars)
    tables = [p for p in listing.parquet if _holds_images(os.path.join(listing.root, p))]
    if images and images >= _MANY * (tars + len(tables)):
        return "images"
    if tars and tables:
        raise DataError(
            f"data.path {path!r} holds tar and parquet shards of images: say which with a pattern, "
            f"such as {_pattern(path, 'tar')} or {_pattern(path, 'parquet')}"
        )
    shards = tars or len(tables)
    if not images and not shards:
        raise DataError(_nothing(path, listing))
    if shards and (not images or shards >= _MANY * images):
        return "tar" if tars else "parquet"
    kind = "tar" if tars else "parquet"
    raise DataError(
        f"data.path {path!r} holds {_counted(images, 'image')} and "
        f"{_counted(shards, f'{kind} file')}: say which with a pattern, such as "
        f"{_pattern(path, kind)}, or move the others"
    )


def _pattern(path: str, kind: str) -> str:
    return f"{path.rstrip('/')}/**/*.{kind}"


def _holds_images(path: bytes) -> bool:
    """Whether a parquet file has a column of images; one that cannot be read may have."""
    import pyarrow.parquet

    from first_stage.data.columns import image_columns

    try:
        schema = pyarrow.parquet.read_schema(os.fsdecode(path))
    except Exception:  # it will be named where it is read
        return True
    return bool(image_columns(schema))


def _nothing(path: str, listing: Listing) -> str:
    reasons = {reason: len(paths) for reason, paths in listing.left_out.items() if paths}
    if listing.parquet:
        reasons["parquet files without a column of images"] = len(listing.parquet)
    if not reasons:
        return (
            f"data.path {path!r} holds no images: no image files, parquet or tar files in it or "
            "below it"
        )
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    words = "; ".join(f"{count:,} {reason}" for reason, count in most)
    return f"data.path {path!r} holds no images that can be read; it has {words}"


def _images_of_split(
    inventory: Inventory,
    listing: Listing,
    split: str | None,
    is_explicit: bool,
    left_out: dict[str, list[bytes]],
) -> list[bytes]:
    for what, paths in (("parquet", listing.parquet), ("tar", listing.tars)):
        reason = f"{what} files: the folder holds {len(listing.images):,} images"
        _put(left_out, reason, paths)
    folders, _ = splits.folder_splits(listing.images)
    inventory.splits = tuple(sorted(set(folders.values())))
    chosen = splits.choose(inventory.path, split, inventory.splits, is_explicit)
    inventory.split = chosen
    images = listing.images
    if folders:
        inventory.prefixes = tuple(folders)
        inventory.class_folders = splits.class_folders(listing.images, tuple(folders))
        wanted = tuple(p for p, name in folders.items() if chosen in (None, name))
        images = [path for path in listing.images if path.startswith(wanted)]
        for prefix, name in folders.items():
            if not prefix.startswith(wanted):
                others = [path for path in listing.images if path.startswith(prefix)]
                _put(left_out, f"images of the split {name}", others)
        stray = [path for path in listing.images if not path.startswith(tuple(folders))]
        _put(left_out, "images beside the folders of the splits", stray)
    stems = {os.path.splitext(path)[0] for path in images} if listing.sidecars else set()
    beside = [p for p in listing.sidecars if os.path.splitext(p)[0] in stems]
    inventory.sidecars = Paths(beside)
    inventory.metadata = Paths(listing.metadata)
    named = set(beside)
    others = [p for p in listing.sidecars if p not in named]
    _put(left_out, "texts and JSON files without an image of the same name", others)
    kinds = Counter(_SIDECAR_KINDS[os.path.splitext(path)[1].lower()] for path in beside)
    for kind, count in sorted(kinds.items()):
        inventory.remarks.append(f"{_counted(count, f'{kind} file')} beside the images")
    for file in listing.metadata:
        inventory.remarks.append(f"{shown(file)} says more of the images")
    return images


def _shards_of_split(
    inventory: Inventory,
    shards: list[bytes],
    split: str | None,
    is_explicit: bool,
    left_out: dict[str, list[bytes]],
) -> list[bytes]:
    if inventory.kind == "parquet":
        tables = [p for p in shards if _holds_images(os.path.join(inventory.root, p))]
        _put(left_out, "parquet files without images", sorted(set(shards) - set(tables)))
        shards = tables
    each = splits.shard_splits(shards)
    inventory.splits = tuple(sorted({name for name in each if name}))
    chosen = splits.choose(inventory.path, split, inventory.splits, is_explicit)
    inventory.split = chosen
    if chosen is None:
        return shards
    for shard, name in zip(shards, each, strict=True):
        if name != chosen:
            reason = f"shards of the split {name}" if name else "shards of no split"
            _put(left_out, reason, [shard])
    return [path for path, name in zip(shards, each, strict=True) if name == chosen]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
