"""Where images come from: folders, hub data sets, saved data sets, shards, built-in sets.

A `Source` is a fixed list of samples. Every sample has a stable id, an image (encoded bytes, a
path, a decoded picture or an array) and, on request, columns such as label or caption.
`take_inventory` tells the kinds apart by what lies at a path; `open_inventory` opens them.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from first_stage.data import builtin
from first_stage.data.columns import find_image_column
from first_stage.data.find_shards import shards_of
from first_stage.data.folder import FolderSource
from first_stage.data.inventory import Inventory, take_inventory
from first_stage.data.sample import Sample, Source
from first_stage.data.shards import RowSource, ShardedRows, count_rows
from first_stage.data.table import DatasetSource
from first_stage.errors import DataError, first_line, root_cause
from first_stage.hub import datasets_asked_once
from first_stage.seeding import Purpose, generator

Split = Literal["train", "validation", "all"]


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

    def __getattr__(self, name: str) -> Any:
        """What only some sources know of a sample: `touched`, `columns_touched`, `keep_classes`."""
        if name in ("touched", "columns_touched"):
            known = getattr(self.source, name)
            return lambda index: known(int(self.indices[index]))
        if name == "image_sizes":
            sizes = self.source.image_sizes  # type: ignore[attr-defined]
            return lambda places: sizes(self.indices[places])
        if name in ("keep_classes", "classes"):
            return getattr(self.source, name)
        raise AttributeError(name)


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
    path: str,
    image_column: str | None = None,
    split: Split = "all",
    hub_split: str | None = "train",
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Open a data set by its path, hub id or built-in name.

    Args:
        path: What `take_inventory` reads.
        image_column: The column with the images, for data sets that have columns.
        split: Which part of a built-in set.
        hub_split: Which split of any other data set; `None`: the only one.
        say: Called with lines for the user: what was found, and what was left out.

    Returns:
        The source.

    Raises:
        DataError: When there is nothing, no image, or no image column.
    """
    return open_inventory(take_inventory(path, hub_split), image_column, split, hub_split, say)


def open_inventory(
    inventory: Inventory,
    image_column: str | None = None,
    part: Split = "all",
    split: str | None = "train",
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Open what an inventory found; see `open_source`.

    Args:
        inventory: From `take_inventory`.
        image_column: The column with the images, for data sets that have columns.
        part: Which part of a built-in set.
        split: Which split of a hub or saved data set.
        say: Called with lines for the user.
    """
    source = _opened(inventory, image_column, part, split)
    for line in inventory.lines():
        say(line)
    return source


def _opened(
    inventory: Inventory,
    image_column: str | None,
    part: Split,
    split: str | None,
) -> Source:
    path = inventory.path
    if inventory.kind == "builtin":
        return ListSource(path, [Sample(*parts) for parts in builtin.load(path, part)])
    if inventory.kind == "hub":
        return _hub_source(path, image_column, split or "train")
    if inventory.kind == "saved":
        return _saved_source(path, image_column, split)
    if inventory.kind == "images":
        return FolderSource(inventory)
    root = os.fsdecode(inventory.root)
    if inventory.kind == "tar":
        shards = count_rows(shards_of(inventory), root=root)
        inventory.remarks += [
            f"{s.name}: {s.problem}; its first {s.rows:,} samples are used"
            for s in shards
            if s.problem
        ]
        return RowSource(ShardedRows(path, shards, image_column))
    return _parquet_source(inventory, image_column, root)


def _parquet_source(inventory: Inventory, image_column: str | None, root: str) -> Source:
    import datasets
    import pyarrow.parquet

    places = shards_of(inventory)
    shards = count_rows(places, root=root)  # names a damaged file, which `datasets` does not
    if not (shards := [shard for shard in shards if shard.rows]):
        raise DataError(f"data.path {inventory.path!r} holds no samples: its tables have no rows")
    schemas = [pyarrow.parquet.read_schema(shard.url) for shard in shards]
    column = find_image_column(
        datasets.Features.from_arrow_schema(schemas[0]), inventory.path, image_column
    )
    common = set(schemas[0].names).intersection(*(schema.names for schema in schemas))
    for shard, schema in zip(shards, schemas, strict=True):
        if column not in schema.names:
            raise DataError(
                f"{shard.url!r} has no column {column!r}, as {shards[0].name} has (it has "
                f"{', '.join(schema.names)})"
            )
        for name in list(common):
            if schema.field(name).type != schemas[0].field(name).type:
                if name == column:
                    raise DataError(
                        f"{shard.url!r} has the column {name!r} as {schema.field(name).type}, "
                        f"{shards[0].name} as {schemas[0].field(name).type}"
                    )
                common.discard(name)
    dropped = sorted({name for schema in schemas for name in schema.names} - common)
    if dropped:
        inventory.remarks.append(
            f"columns that not all files have alike are not read: {', '.join(dropped)}"
        )
    files = {"train": [shard.url for shard in shards]}
    names = [name for name in schemas[0].names if name in common]
    dataset = _loaded(
        lambda: datasets.load_dataset(
            "parquet", data_files=files, split="train", **({"columns": names} if dropped else {})
        ),
        f"data.path {inventory.path!r} cannot be read",
    )
    counts = [(shard.url, shard.name, shard.rows) for shard in shards]
    return DatasetSource(dataset, inventory.path, column, [root], counts)


def _saved_source(path: str, image_column: str | None, split: str | None) -> Source:
    import datasets

    dataset = _loaded(lambda: datasets.load_from_disk(path), f"data.path {path!r} cannot be read")
    if isinstance(dataset, datasets.DatasetDict):
        if split == "all":
            dataset = datasets.concatenate_datasets(list(dataset.values()))
        elif split is None and len(dataset) == 1:
            dataset = next(iter(dataset.values()))
        elif split is None:
            raise DataError(
                f"{path!r} has the splits {', '.join(dataset)}: say which with data.split, or all"
            )
        elif split not in dataset:
            raise DataError(
                f"data.split is {split!r}, but {path!r} has the splits: {', '.join(dataset)}"
            )
        else:
            dataset = dataset[split]
    elif split not in (None, "train", "all", str(dataset.split)):
        raise DataError(f"data.split is {split!r}, but {path!r} has no splits: leave it out")
    return DatasetSource(dataset, path, image_column, [path])


def _hub_source(path: str, image_column: str | None, split: str) -> Source:
    import datasets

    with datasets_asked_once() as if_out_of_reach:
        dataset = _loaded(
            lambda: datasets.load_dataset(path, split=split),
            f"data.path {path!r} is no folder or file here, is not one of the built-in sets "
            f"({', '.join(builtin.NAMES)}), and could not be loaded from the hub{if_out_of_reach}",
        )
    return DatasetSource(dataset, path, image_column)


def _loaded(load: Callable[[], Any], problem: str) -> Any:
    """What `datasets` loads; its errors wrap the cause, which is what is told.

    Raises:
        DataError: With the cause.
    """
    with _quiet_datasets():
        try:
            return load()
        except Exception as error:
            cause = root_cause(error)
            told = first_line(cause)
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                import datasets

                told = (
                    f"{datasets.config.HF_DATASETS_CACHE}, where datasets keeps its copy, is "
                    "full: set HF_HOME to another disk, or data.streaming to true"
                )
            raise DataError(f"{problem}: {told}") from error


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
