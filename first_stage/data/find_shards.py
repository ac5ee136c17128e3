"""Where shards of parquet and WebDataset files are: here, behind an address, or on the hub."""

import os
from collections.abc import Sequence

from first_stage.data.inventory import Inventory, take_inventory
from first_stage.data.retry import with_retries
from first_stage.errors import DataError, first_line
from first_stage.hub import datasets_asked_once

_KINDS = (".parquet", ".tar")


def find_shards(path: str, split: str | None = "train") -> list[tuple[str, str]]:
    """The shards at a path, sorted by name.

    Args:
        path: What `take_inventory` reads, a URL of shards (`s3://...`, also with `*`), or a data
            set id on the hub.
        split: Which split.

    Returns:
        For each its address and what ids call it.

    Raises:
        DataError: When there are none.
    """
    if "://" in path:
        return _named(_only_shards(_remote_shards(path), path))
    inventory = take_inventory(path, split)
    if inventory.kind == "hub":
        return _named(_only_shards(_hub_shards(path, split or "train"), path))
    return shards_of(inventory)


def shards_of(inventory: Inventory) -> list[tuple[str, str]]:
    """The shards of an inventory; see `find_shards`.

    Raises:
        DataError: When it lists something else.
    """
    if inventory.kind not in ("parquet", "tar"):
        raise _none(inventory.path)
    return [(os.fsdecode(inventory.full(i)), inventory.id(i)) for i in range(len(inventory))]


def _only_shards(urls: Sequence[str], path: str) -> list[str]:
    suffix = next((s for s in _KINDS if any(u.lower().endswith(s) for u in urls)), None)
    if suffix is None:
        raise _none(path)
    return sorted(url for url in urls if url.lower().endswith(suffix))


def _none(path: str) -> DataError:
    return DataError(
        f"data.path {path!r} holds no parquet or WebDataset (.tar) shards, which "
        "data.streaming reads: convert it, or set data.streaming to false"
    )


def _named(urls: Sequence[str]) -> list[tuple[str, str]]:
    """Addresses beside what is left of them without what all begin with."""
    parts = [url.split("/")[:-1] for url in urls]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [(url, "/".join(url.split("/")[shared:])) for url in urls]


def _remote_shards(path: str) -> list[str]:
    import fsspec

    def listed() -> list[str]:
        system, place = fsspec.url_to_fs(path)
        if "*" not in place and system.isdir(place):
            place = place.rstrip("/") + "/*"
        return [system.unstrip_protocol(name) for name in system.glob(place)]

    try:
        return with_retries(listed, path)
    except Exception as error:
        raise DataError(f"data.path {path!r} cannot be listed: {first_line(error)}") from error


def _hub_shards(path: str, split: str) -> list[str]:
    import datasets

    with datasets_asked_once() as if_out_of_reach:
        try:
            files = datasets.load_dataset_builder(path).config.data_files
        except Exception as error:
            raise DataError(
                f"data.path {path!r} is no file or folder here and could not be found on the hub"
                f"{if_out_of_reach}: {first_line(error)}"
            ) from error
    if not files or split not in files:
        there = ", ".join(files or ()) or "none"
        raise DataError(f"data.split is {split!r}, but {path!r} has the splits: {there}")
    return [str(name) for name in files[split]]
