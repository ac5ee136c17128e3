"""A folder of images, with the labels and captions that lie beside them."""

import csv
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from first_stage.data.broken import BrokenImage
from first_stage.data.files import read_bytes
from first_stage.data.inventory import Inventory
from first_stage.data.paths import Paths, shown
from first_stage.data.sample import Sample
from first_stage.errors import DataError, first_line
from first_stage.files import patiently

_FEW = 100
"""One image in so many, or one in all, may lie beside the class folders."""
_FILE_NAMES = ("file_name", "image_file_name", "filename")
_SIDECARS = ((b".txt", "caption"), (b".caption", "caption"), (b".json", "json"))


class FolderSource:
    """Images in a folder, nested or not; the first folder level is the label.

    Columns, as far as there is anything for them: `label` and `class` from folders, `caption` from
    `x.txt` or `x.caption`, `json` from `x.json`, and those of `metadata.jsonl`, `.csv` or
    `.parquet` (its column `file_name` says which image, as in `datasets`' imagefolder).

    Args:
        inventory: Which files.

    Raises:
        DataError: When a metadata file cannot be read.
    """

    def __init__(self, inventory: Inventory):
        self.name = inventory.path
        self.root = os.fsdecode(inventory.root)
        self._paths = inventory.files
        self.classes: list[str] = []
        self._labels = np.zeros(0, np.int32)
        self._read_labels(inventory)
        self._read_sidecars(inventory)
        self._tables: list[pa.Table] = []
        self._rows = np.zeros((0, len(self)), np.int32)
        places = [os.path.join(inventory.root, file) for file in inventory.metadata]
        self._metadata_touched = max([0.0, *map(_touched, places)])
        self._read_metadata(inventory)
        names = ["label", "class"] if self.classes else []
        names += sorted({name for _, name in self._beside})
        names += [name for table in self._tables for name in table.column_names]
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(names))

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The path relative to the folder, with its extension."""
        return self._paths.text(index)

    def ids(self) -> pa.Array:
        """All ids."""
        return self._paths.texts()

    @property
    def paths(self) -> Paths:
        """All paths, relative to the folder."""
        return self._paths

    def path(self, index: int) -> bytes:
        """The file's path."""
        return os.path.join(os.fsencode(self.root), self._paths[index])

    def read(self, index: int) -> Sample:
        """The sample's path, and its columns, which are read when they are asked for."""
        place = Path(os.fsdecode(self.path(index)))
        columns: Mapping[str, Any] = _Columns(self, index) if self.columns else {}
        return Sample(self.id(index), place, columns)

    def touched(self, index: int) -> float:
        """When a file was last written, replaced or moved here: seconds since 1970."""
        return _touched(self.path(index))

    def image_sizes(self, places: np.ndarray) -> np.ndarray:
        """Bytes of these files; -1 for one that cannot be looked at."""
        return np.array([_bytes_of(self.path(index)) for index in places.tolist()], np.int64)

    def columns_touched(self, index: int) -> float:
        """The same of the files that say something of it."""
        beside = [self._beside_it(index, suffix) for suffix, _ in self._beside]
        times = [_touched(path) for path in beside if path is not None]
        return max([self._metadata_touched, *times])

    def keep_classes(self, known: list[str]) -> list[str]:
        """Number classes as before; those that are not known get the next numbers.

        Args:
            known: Class names in the order of their labels.

        Returns:
            All class names in that order.
        """
        names = [*known, *(name for name in self.classes if name not in known)]
        if self.classes and names != self.classes:
            numbers = np.array([names.index(name) for name in self.classes] + [-1], np.int32)
            self._labels = numbers[self._labels]
            self.classes = names
        return names

    # -- labels ------------------------------------------------------------------------------

    def _read_labels(self, inventory: Inventory) -> None:
        prefixes = tuple(sorted(inventory.prefixes, key=len, reverse=True))
        tops: list[bytes] = []
        for path in self._paths:
            prefix = next((p for p in prefixes if path.startswith(p)), b"")
            rest = path[len(prefix) :]
            tops.append(rest.split(b"/", 1)[0] if b"/" in rest else b"")
        counts = Counter(tops)
        stray = counts.pop(b"", 0)
        is_labelled = bool(counts) and (
            not stray or (len(counts) > 1 and stray <= max(1, len(tops) // _FEW))
        )
        if not is_labelled:
            if stray and counts and len(self) > 1:
                inventory.remarks.append(
                    f"no labels: {stray:,} images lie beside the folders {_some(counts)}"
                )
            return
        # Those of all splits, so that a number means the same in each of them.
        names = sorted({*counts, *inventory.class_folders})
        self.classes = [shown(name) for name in names]
        numbers = {name: number for number, name in enumerate(names)}
        self._labels = np.array([numbers.get(top, -1) for top in tops], np.int32)
        if stray:
            first = self._paths.text(tops.index(b""))
            inventory.remarks.append(
                f"{stray:,} image{'s' if stray > 1 else ''} beside the class folders "
                f"{'have' if stray > 1 else 'has'} no label: {first}"
            )

    # -- files beside images -----------------------------------------------------------------

    def _read_sidecars(self, inventory: Inventory) -> None:
        there = set(inventory.sidecars)
        usual = (*(s for s, _ in _SIDECARS), *(s.upper() for s, _ in _SIDECARS))
        self._unusual = {}  # .Txt and the like, by what they would usually be called
        for path in there:
            stem, suffix = os.path.splitext(path)
            if suffix not in usual:
                self._unusual[stem + suffix.lower()] = path
        self._beside: list[tuple[bytes, str]] = [
            (suffix, name)
            for suffix, name in _SIDECARS
            if any(path.lower().endswith(suffix) for path in there)
        ]

    def _sidecar(self, index: int, name: str) -> Any:
        for suffix, column in self._beside:
            if column == name and (path := self._beside_it(index, suffix)) is not None:
                return self._decoded(os.fsdecode(path), suffix)
        return None

    def _beside_it(self, index: int, suffix: bytes) -> bytes | None:
        """The file of this suffix beside an image, however it is capitalized."""
        stem = os.path.splitext(self._paths[index])[0]
        named = (stem + suffix, stem + suffix.upper(), self._unusual.get(stem + suffix))
        places = [os.path.join(os.fsencode(self.root), name) for name in named if name is not None]
        return next((place for place in places if _is_file(place)), None)

    @staticmethod
    def _decoded(path: str, suffix: bytes) -> Any:
        content = read_bytes(path)
        try:
            text = content.decode("utf-8-sig")  # editors may begin it with a mark
            return json.loads(text) if suffix == b".json" else text.strip()
        except (ValueError, RecursionError) as error:
            name = os.path.basename(path)
            raise BrokenImage(f"{name} beside it cannot be read: {error}") from None

    # -- metadata ----------------------------------------------------------------------------

    def _read_metadata(self, inventory: Inventory) -> None:
        if not len(inventory.metadata):
            return
        places = {name: index for index, name in enumerate(self._paths)}
        rows = []
        for file in inventory.metadata:
            path = os.fsdecode(os.path.join(inventory.root, file))
            table = read_table(path)
            key = next((name for name in _FILE_NAMES if name in table.column_names), None)
            if key is None:
                inventory.remarks.append(
                    f"{shown(file)} has no column file_name and is not read (it has "
                    f"{', '.join(table.column_names)})"
                )
                continue
            folder = os.path.dirname(file)
            found = np.full(len(self), -1, np.int32)
            lost, again = 0, 0
            for row, name in enumerate(table[key].to_pylist()):
                index = self._named(places, folder, os.fsencode(str(name)))
                if index is None:
                    lost += 1
                else:
                    again += bool(found[index] >= 0)
                    found[index] = row
            for count, words in ((lost, "name no image that is read"),
                                 (again, "name an image again; the last one counts")):  # fmt: skip
                if count:
                    inventory.remarks.append(f"{count:,} rows of {shown(file)} {words}")
            if self.classes and {"label", "class"} & set(table.column_names):
                inventory.remarks.append(f"labels are those of {shown(file)}, not of the folders")
                self.classes = []
            rows.append(found)
            self._tables.append(table.drop_columns([key]))
        if rows:
            self._rows = np.stack(rows)
            without = int((self._rows < 0).all(0).sum())
            if without:
                inventory.remarks.append(f"{without:,} images have no row of metadata")

    def _named(self, places: Mapping[bytes, int], folder: bytes, name: bytes) -> int | None:
        """The image that a row names: beside its file, or by its whole path; also with `\\`."""
        for spelled in (name, name.replace(b"\\", b"/")):
            if os.path.isabs(spelled):
                root = os.path.realpath(os.fsencode(self.root))
                relative = os.path.relpath(os.path.realpath(spelled), root)
            else:
                relative = os.path.normpath(os.path.join(folder, spelled))
            if relative in places:
                return places[relative]
        return None

    def value(self, index: int, name: str) -> Any:
        """One column of a sample; `None` where there is nothing."""
        for rows, table in zip(self._rows, self._tables, strict=True):
            if rows[index] >= 0 and name in table.column_names:
                return table[name][int(rows[index])].as_py()
        if any(name == column for _, column in self._beside):
            return self._sidecar(index, name)
        if self.classes and name in ("label", "class"):
            label = int(self._labels[index])
            if label < 0:
                return None
            return label if name == "label" else self.classes[label]
        return None


def _touched(path: bytes) -> float:
    """When a file was last changed; 0 where there is none."""
    facts = _facts(path)
    return max(facts.st_mtime, facts.st_ctime) if facts is not None else 0.0


def _bytes_of(path: bytes) -> int:
    facts = _facts(path)
    return facts.st_size if facts is not None else -1


def _is_file(path: bytes) -> bool:
    facts = _facts(path)
    return facts is not None and stat.S_ISREG(facts.st_mode)


def _facts(path: bytes) -> os.stat_result | None:
    """What a file looks like from outside; `None` where there is none.

    Raises:
        MachineError: When the machine fails to say: "not there" would cost a caption.
    """
    try:
        return patiently(lambda: os.stat(path), repr(os.fsdecode(path)))
    except OSError:
        return None


class _Columns(Mapping[str, Any]):
    """A sample's columns, read when they are asked for."""

    def __init__(self, source: FolderSource, index: int):
        self._source, self._index = source, index

    def __getitem__(self, name: str) -> Any:
        if name not in self._source.columns:
            raise KeyError(name)
        return self._source.value(self._index, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.columns)

    def __len__(self) -> int:
        return len(self._source.columns)


def read_table(path: str) -> pa.Table:
    """A table of metadata: JSON lines, CSV or parquet.

    Raises:
        DataError: When it cannot be read.
    """
    try:
        if path.lower().endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path)
        with open(path, encoding="utf-8-sig", newline="") as stream:
            if path.lower().endswith(".csv"):
                return pa.Table.from_pylist(list(csv.DictReader(stream)))
            rows = [_row(line, number) for number, line in enumerate(stream, 1) if line.strip()]
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    except Exception as error:
        raise DataError(f"the metadata {path!r} cannot be read: {first_line(error)}") from error


def _row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} is no JSON: {first_line(error)}") from None
    if not isinstance(row, dict):
        raise DataError(f"line {number} is no JSON object with a file_name")
    return row


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of mixed types
        return pa.array([
            value if value is None or isinstance(value, str)
            else json.dumps(value, ensure_ascii=False)
            for value in values
        ])  # fmt: skip


def _some(names: Mapping[bytes, int]) -> str:
    first = [shown(name) for name in sorted(names)[:3]]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")
