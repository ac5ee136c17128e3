"""Where images come from: folders, hub data sets, saved data sets, shards, built-in sets.

A `Source` is a fixed list of samples. Every sample has a stable id, an image (encoded bytes, a
path or a decoded picture) and, on request, columns such as label or caption. `open_source` tells
the kinds apart by what lies at the path.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from first_stage.data import builtin
from first_stage.errors import DataError, first_line
from first_stage.seeding import Purpose, generator

Split = Literal["train", "validation", "all"]

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "jfif", "jp2", "jpeg", "jpg", "pbm"),
        *("pgm", "png", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixels", "picture", "photo")


@dataclass(frozen=True)
class Sample:
    """One sample of a source.

    Attributes:
        id: Stable and unique in its source: the path relative to the data folder *with* its
            extension, or the shard's key, or the row.
        image: Encoded bytes, a path, or a decoded picture.
        columns: The columns asked for, as Python values.
    """

    id: str
    image: bytes | Path | Image.Image
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """A fixed list of samples."""

    name: str
    """What a user would recognise: the path or id."""
    columns: tuple[str, ...]
    """Names of the columns that samples can carry beside the image."""

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """The id of a sample, without reading its image."""
        ...

    def read(self, index: int) -> Sample:
        """Read one sample; what is in the file is not decoded yet."""
        ...


class FolderSource:
    """A folder of images, nested or not; the first folder level is the label when all have one.

    Args:
        root: The folder. Links that lead out of it are left out.

    Raises:
        DataError: When there is no image in it.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.name = str(root)
        self._paths = sorted(_image_files(self.root))
        if not self._paths:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(
                f"data.path {str(root)!r} holds no images (looked in every subfolder for {kinds})"
            )
        tops = {path.split("/", 1)[0] if "/" in path else "" for path in self._paths}
        self.classes: list[str] = [] if "" in tops else sorted(tops)
        self._labels = {name: number for number, name in enumerate(self.classes)}
        self.columns: tuple[str, ...] = ("label", "class") if self.classes else ()

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        """The path relative to the folder, with its extension."""
        return self._paths[index]

    def read(self, index: int) -> Sample:
        """The sample's path, and its label and class name where there are class folders."""
        path = self._paths[index]
        columns: dict[str, Any] = {}
        if self.classes:
            top = path.split("/", 1)[0]
            columns = {"label": self._labels[top], "class": top}
        return Sample(path, self.root / path, columns)


def _image_files(root: Path) -> Iterator[str]:
    inside = root.resolve()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            if Path(file).suffix.lower() not in IMAGE_SUFFIXES or file.startswith("."):
                continue
            path = Path(folder, file)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                continue
            yield path.relative_to(root).as_posix()


class DatasetSource:
    """A `datasets.Dataset` with an image column, whose files are left encoded until needed.

    Args:
        dataset: The data set.
        name: Its path or hub id, for messages.
        image_column: The column with the images; found by type and name when `None`.

    Raises:
        DataError: When the column is not there or does not hold images.
    """

    def __init__(self, dataset: Any, name: str, image_column: str | None = None):
        import datasets

        if len(dataset) == 0:
            raise DataError(f"data.path {name!r} holds no samples")
        column = find_image_column(dataset.features, name, image_column)
        self.dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.name = name
        self.image_column = column
        self.columns = tuple(c for c in dataset.column_names if c != column)
        self._key = "__key__" if "__key__" in dataset.column_names else None
        self._keys = self.dataset.select_columns([self._key]) if self._key else None

    def __len__(self) -> int:
        return len(self.dataset)

    def id(self, index: int) -> str:
        """The row's number, after the shard's key for WebDataset shards."""
        # Keys repeat across shards in the wild; the row makes the id unique.
        row = f"{index:09d}"
        return f"{self._keys[index][self._key]}#{row}" if self._keys is not None else row

    def read(self, index: int) -> Sample:
        """The row's encoded image and its other columns."""
        row = self.dataset[index]
        image = encoded_image(row.pop(self.image_column), self.name)
        row.pop("__url__", None)
        return Sample(self.id(index), image, row)


def encoded_image(value: Any, name: str) -> bytes | Path:
    """The file inside an undecoded `datasets.Image` value; empty bytes where there is none."""
    if value is None:
        return b""
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    if value.get("path"):
        return Path(value["path"])
    return b""


def find_image_column(features: Any, name: str, wanted: str | None) -> str:
    """The column that holds images.

    Args:
        features: `datasets.Features` of the data set.
        name: Path or id, for messages.
        wanted: The name asked for, or `None` to find it.

    Returns:
        The column's name: the one asked for, or the only image-typed one, or one named like an
        image.

    Raises:
        DataError: Naming the columns that are there.
    """
    import datasets

    there = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise DataError(
                f"data.image_column is {wanted!r}, but {name!r} has the columns: {there}"
            )
        return wanted
    typed = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [c for c in _IMAGE_NAMES if c in features]
    if len(typed) == 1:
        return typed[0]
    for column in named:
        if not typed or column in typed:
            return column
    raise DataError(
        f"{name!r} has no column that is clearly the image (columns: {there}): "
        "set data.image_column to one of them"
    )


class ListSource:
    """Pictures held in memory: the built-in sets.

    Args:
        name: The set's name.
        samples: Its samples.
    """

    def __init__(self, name: str, samples: Sequence[Sample]):
        self.name = name
        self._samples = list(samples)
        self.columns: tuple[str, ...] = tuple(samples[0].columns) if samples else ()

    def __len__(self) -> int:
        return len(self._samples)

    def id(self, index: int) -> str:
        """The sample's id."""
        return self._samples[index].id

    def read(self, index: int) -> Sample:
        """The sample."""
        return self._samples[index]


class SubsetSource:
    """Some samples of another source.

    Args:
        source: The other source.
        indices: Which of its samples, in order.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.name, self.columns = source.name, source.columns

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        """The sample's id in the other source."""
        return self.source.id(int(self.indices[index]))

    def read(self, index: int) -> Sample:
        """The sample of the other source."""
        return self.source.read(int(self.indices[index]))


def split_source(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Set samples aside that are never trained on.

    Args:
        source: All samples.
        share: The share to hold out, in [0, 1); at least one sample is held out when it is above 0.
        seed: The run's seed; the same seed holds out the same samples.

    Returns:
        The samples to train on and the held-out ones.

    Raises:
        DataError: When nothing would be left to train on.
    """
    held = min(max(round(len(source) * share), 1), len(source)) if share > 0 else 0
    if held == len(source):
        raise DataError(
            f"data.validation_share {share} of the {len(source)} samples of {source.name!r} leaves "
            "nothing to train on: lower it, or give data.validation_path"
        )
    order = generator(seed, Purpose.SPLIT, 0).permutation(len(source))
    return (
        SubsetSource(source, np.sort(order[held:])),
        SubsetSource(source, np.sort(order[:held])),
    )


def is_builtin(path: str) -> bool:
    """Whether a path names a built-in set; a file or folder of that name goes first."""
    return path in builtin.NAMES and not Path(path).exists()


def open_source(
    path: str, image_column: str | None = None, split: Split = "all", hub_split: str = "train"
) -> Source:
    """Open a data set by its path, hub id or built-in name.

    Args:
        path: A folder of images; a folder written by `datasets.save_to_disk`; a parquet file or a
            folder of them; a WebDataset `.tar` shard or a folder of them; `photos` or `digits`; or
            a data set id on the Hugging Face hub.
        image_column: The column with the images, for data sets that have columns.
        split: Which part of a built-in set; other sources have no parts of their own.
        hub_split: Which split of a hub or saved data set.

    Returns:
        The source.

    Raises:
        DataError: When there is nothing, no image, or no image column.
    """
    if is_builtin(path):
        return ListSource(path, [Sample(*parts) for parts in builtin.load(path, split)])
    local = Path(path)
    if not local.exists():
        return _hub_source(path, image_column, hub_split)
    if shards := shard_files(local):
        return _shard_source(path, shards, image_column)
    if local.is_file():
        raise DataError(f"data.path {path!r} is a file of no known kind (known: .parquet, .tar)")
    if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
        return _saved_source(path, image_column, hub_split)
    return FolderSource(local)


def shard_files(path: Path) -> list[Path]:
    """The parquet or tar shards at a path: the file itself, or those directly in the folder."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    for suffix in (".parquet", ".tar"):
        shards = [p for p in files if p.suffix == suffix]
        if shards:
            return shards
    return []


def shard_builder(shards: Sequence[Path]) -> str:
    """The `datasets` builder that reads these shards."""
    return "parquet" if shards[0].suffix == ".parquet" else "webdataset"


def _shard_source(path: str, shards: Sequence[Path], image_column: str | None) -> Source:
    import datasets

    files = {"train": [str(p) for p in shards]}
    with _quiet_datasets():
        try:
            dataset = datasets.load_dataset(shard_builder(shards), data_files=files, split="train")
        except Exception as error:
            raise DataError(f"data.path {path!r} cannot be read: {first_line(error)}") from error
    return DatasetSource(dataset, path, image_column)


def _saved_source(path: str, image_column: str | None, hub_split: str) -> Source:
    import datasets

    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        raise DataError(f"data.path {path!r} cannot be read: {first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if hub_split not in dataset:
            raise DataError(
                f"data.split is {hub_split!r}, but {path!r} has the splits: {', '.join(dataset)}"
            )
        dataset = dataset[hub_split]
    return DatasetSource(dataset, path, image_column)


def _hub_source(path: str, image_column: str | None, hub_split: str) -> Source:
    import datasets

    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_like_path or not path.strip():
        raise DataError(f"data.path {path!r} does not exist")
    with _quiet_datasets():
        try:
            dataset = datasets.load_dataset(path, split=hub_split)
        except Exception as error:
            raise DataError(
                f"data.path {path!r} is no folder or file here, is not one of the built-in sets "
                f"({', '.join(builtin.NAMES)}), and could not be loaded from the hub: "
                f"{first_line(error)}"
            ) from error
    return DatasetSource(dataset, path, image_column)


class _quiet_datasets:
    """Without the progress bars of `datasets`, which would interleave over processes."""

    def __enter__(self) -> None:
        import datasets

        self._disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        if not self._disabled:
            datasets.enable_progress_bars()
