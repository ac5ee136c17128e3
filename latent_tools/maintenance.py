"""What `first-stage latents` does: look into a cache, check it, picture it, tidy it up.

Nothing here deletes anything unless told to.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from first_stage.data import (
    BrokenImage,
    Reading,
    Source,
    displayed,
    images_from_pixels,
    open_inventory,
    pixels_from_images,
    take_inventory,
)
from first_stage.errors import UserError
from first_stage.files import TEMPORARY, sha256, write_atomic
from latent_tools.build.follow import changed_ids, notice
from latent_tools.build.images import ChunkReader, Preprocessing
from latent_tools.build.parquet import ParquetStream
from latent_tools.build.prepare import source_ids
from latent_tools.build.stopped import why_stopped
from latent_tools.format.files import CacheError, LaunchLock
from latent_tools.format.index import INDEX, Index
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan, committed_of, committed_units
from latent_tools.format.shards import (
    COMMITS,
    SHARDS,
    ShardReader,
    commit_path,
    is_committed,
    read_commit,
    unit_of_shard,
)
from latent_tools.read.dataset import LatentDataset

_RELEASED = ".released"


def describe(folder: Path) -> list[str]:
    """What is in a cache, as lines.

    Args:
        folder: The cache.
    """
    manifest, plan = Manifest.load(folder), Plan.load(folder)
    stage, store, seen = manifest.first_stage, manifest.store, manifest.preprocessing
    units = plan.units
    done = committed_of(units, folder)
    shapes: dict[tuple[int, int], int] = {}
    for unit in units:
        shapes[unit.shape] = shapes.get(unit.shape, 0) + len(unit)
    lines = [
        f"first stage   {stage['class']} {stage['name']}",
        f"              encoder {stage['encoder_sha256'][:16]}, decoder "
        f"{stage['decoder_sha256'][:16]}",
        f"              {stage['latent_channels']} latent channels, downsample factor "
        f"{stage['downsample_factor']}",
        f"stored        {store['representation']} in {store['dtype']}"
        f"{', flipped images too' if store['flip'] else ''}",
        f"columns       {', '.join(store['columns']) or 'none'}",
        f"data          {manifest.source.get('path')}",
    ]
    for (height, width), count in sorted(shapes.items()):
        lines.append(f"pixels        {height}x{width}: {count} samples")
    if not seen["buckets"]:
        lines.append(f"              resized to {seen['resize'] or 'nothing'}, centre crop")
    lines.append(f"units         {len(done)} of {len(units)} committed")
    counts = manifest.counts
    if counts:
        lines.append(
            f"samples       {counts['samples']}, {counts['failures']} failed, "
            f"{counts['bytes'] / 2**20:.1f} MiB"
        )
        lines += _error_lines(manifest.statistics)
    if len(done) < len(units) or not (folder / INDEX).exists():
        when = ""
        if why := why_stopped(folder):
            lines.append(f"stopped       an earlier launch: {why}")
            when = " once they are mended, or with a larger --data.max_broken"
        lines.append(
            f"not finished; to go on{when}: {manifest.command or 'start its command again'}"
        )
    elif counts and counts["samples"] + counts["failures"] < len(plan):
        lines.append("grown since it was finished; start its command again to finish it")
    return lines


def unfinished(folder: Path) -> str:
    """That a cache is not finished, and how to go on; empty when it is finished.

    Args:
        folder: The cache.
    """
    manifest, plan = Manifest.load(folder), Plan.load(folder)
    units, counts = plan.units, manifest.counts
    done = len(committed_of(units, folder))
    is_counted = counts and counts["samples"] + counts["failures"] >= len(plan)
    if done == len(units) and (folder / INDEX).exists() and is_counted:
        return ""
    stopped = f" (an earlier launch stopped: {why})" if (why := why_stopped(folder)) else ""
    return f"The cache is not finished{stopped}; to go on: {redo_command(manifest)}"


def _error_lines(statistics: dict[str, Any]) -> list[str]:
    """What storing and encoding changed, of the latents and of the posteriors' spread."""
    lines = []
    for name, title in (("storage_error", "rounding"), ("precision_error", "precision")):
        if error := statistics.get(name):
            line = f"{title:14}rms {error['rms']:.3g}, largest {error['max']:.3g}"
            if spread := statistics.get(f"{name}_logvar"):
                # An error e of a log-variance scales the standard deviation by exp(e / 2).
                line += f"; posterior std by up to {math.expm1(spread['max'] / 2):.2%}"
            lines.append(line)
    return lines


@dataclass(frozen=True)
class Damage:
    """Something wrong with a unit.

    Attributes:
        unit: Its number.
        file: The file, relative to the cache.
        reason: What is wrong.
    """

    unit: int
    file: str
    reason: str


def damages(folder: Path) -> Iterator[Damage | None]:
    """Check every committed unit against its commit and the plan.

    Args:
        folder: The cache.

    Yields:
        For each committed unit its damage, or `None`.
    """
    plan = Plan.load(folder)
    there = set(committed_units(folder))
    for unit in plan.units:
        if unit.number in there:
            yield _damage(folder, plan, unit.number, plan.ids(unit))


def _damage(folder: Path, plan: Plan, number: int, planned: list[str]) -> Damage | None:
    file = f"{COMMITS}/{commit_path(folder, number).name}"
    try:
        commit = read_commit(folder, number)
        listed = [*commit["ids"], *(failure["id"] for failure in commit["failures"])]
    except (UserError, KeyError, TypeError) as error:
        return Damage(number, file, f"cannot be read: {error}")
    if sorted(listed) != sorted(planned):
        return Damage(number, file, "does not list the planned samples")
    if commit["shard"] is None:
        return None
    path = folder / SHARDS / Path(commit["shard"]).name
    file = f"{SHARDS}/{path.name}"
    if not path.exists():
        return Damage(number, file, "is missing")
    size = path.stat().st_size
    if size != commit["bytes"]:
        return Damage(number, file, f"has {size} bytes instead of {commit['bytes']}")
    if (digest := sha256(path)) != commit["sha256"]:
        return Damage(number, file, f"has sha256 {digest[:16]} instead of {commit['sha256'][:16]}")
    if ShardReader(folder).ids(path.name) != commit["ids"]:
        return Damage(number, file, "names other samples than its commit")
    return None


def release(folder: Path, unit: int) -> Path:
    """Set a unit's commit aside, so that the next launch encodes that unit, and only it, again.

    Returns:
        Where the commit is now.
    """
    manifest = Manifest.load(folder)
    manifest.counts = {}  # no longer finished: the next launch counts again
    manifest.save(folder)
    path = commit_path(folder, unit)
    aside = path.with_name(path.name + _RELEASED)
    os.replace(path, aside)
    return aside


def changed_samples(folder: Path, data: str | None = None) -> Iterator[tuple[str, str]]:
    """Samples whose file is not what was encoded.

    Args:
        folder: The cache.
        data: Where the data is now; where it was when `None`.

    Yields:
        Id and what is different.
    """
    manifest, plan = Manifest.load(folder), Plan.load(folder)
    source = _open(manifest, data)
    if (keep := getattr(source, "keep_classes", None)) is not None:
        keep(manifest.source.get("classes") or [])
    yield from changed_ids(notice(folder, plan, source, source_ids(source), everything=True))


def statistics_table(folder: Path) -> list[str]:
    """The statistics as lines of a table.

    Raises:
        CacheError: When the cache is not finished.
    """
    stats = Manifest.load(folder).statistics
    if not stats:
        raise CacheError(
            f"{str(folder)!r} has no statistics yet: they are written when every unit is encoded"
        )
    names = [n for n in ("mean", "std", "mean_std", "posterior_std") if n in stats]
    lines = ["channel " + "".join(f"{name:>16}" for name in names)]
    for channel in range(len(stats["mean"])):
        lines.append(f"{channel:7d} " + "".join(f"{stats[n][channel]:16.8f}" for n in names))
    lines.append(
        f"over all channels of {stats['images']} samples: scaling_factor "
        f"{stats['scaling_factor']:.8f} (1 / std), shift_factor {stats['shift_factor']:.8f} (mean)"
    )
    return lines


def preview(
    folder: Path,
    output: Path,
    count: int = 8,
    data: str | None = None,
    first_stage: str | None = None,
) -> list[str]:
    """Write a picture of samples: originals above, decoded latents below.

    Args:
        folder: The cache.
        output: The picture's file.
        count: How many samples of the first bucket, evenly spread.
        data: Where the data is now; where it was when `None`.
        first_stage: Folder or hub id of the first stage; the one that made the cache when `None`.

    Returns:
        The ids from left to right.
    """
    dataset = LatentDataset(folder, sample="mean", normalize="none", flip=0.0)
    if not len(dataset):
        raise CacheError(f"{str(folder)!r} has no samples to show")
    shape = tuple(int(side) for side in dataset.shapes[0])
    rows = np.flatnonzero((dataset.shapes == shape).all(1))
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
    names = [dataset.ids[row] for row in chosen]
    decoded = [
        pixels_from_images(image[None])[0].numpy()
        for image in dataset.decode_preview(names, first_stage)
    ]
    originals = _originals(dataset, names, (shape[0], shape[1]), data)
    lines = [np.concatenate(line, axis=1) for line in (originals, decoded) if line]
    picture = np.concatenate(lines)
    picture = picture[:, :, displayed(picture.shape[2])]
    if picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if output.suffix.lower() not in Image.registered_extensions():
        raise CacheError(f"output {str(output)!r} does not end as a picture does: name a .png")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, lambda path: Image.fromarray(picture).save(path))
    return names


def _originals(
    dataset: LatentDataset, names: list[str], shape: tuple[int, int], data: str | None
) -> list[np.ndarray]:
    """The pixels that were encoded; nothing when the data is not there any more."""
    seen = dataset.manifest.preprocessing
    try:
        source = _open(dataset.manifest, data)
    except UserError:
        if data is not None:
            raise
        return []
    where = {source.id(place): place for place in range(len(source))}
    reader = ChunkReader(
        source,
        Preprocessing(
            _reading(seen), seen["resolution"], seen["resize"], seen["buckets"] is not None, ()
        ),
    )
    pictures = []
    for name in names:
        try:
            _, pixels = reader.read(name, where.get(name, -1), shape)
        except BrokenImage as error:
            raise CacheError(f"the original of {name!r} {error}") from error
        # Through the same rounding as the decoded ones.
        images = images_from_pixels(torch.from_numpy(pixels)[None])
        pictures.append(pixels_from_images(images)[0].numpy())
    return pictures


def _reading(seen: dict[str, Any]) -> Reading:
    """How a cache's images were read."""
    select, value_range = seen.get("select"), seen.get("value_range")
    return Reading(
        seen["channels"],
        tuple(select) if select is not None else None,
        (value_range[0], value_range[1]) if value_range is not None else None,
        seen.get("color", "keep"),
        upright=seen.get("upright", True),
        reduced=seen.get("decode") == "reduced",
    )


def _open(manifest: Manifest, data: str | None) -> Source:
    about = manifest.source
    path, split = data or about["path"], about.get("split") or "train"
    inventory = take_inventory(path, split) if "://" not in path else None
    if inventory is None or (about.get("streaming") and inventory.kind in ("parquet", "hub")):
        return ParquetStream(path, about.get("image_column"), split)
    return open_inventory(inventory, about.get("image_column"), "all", split)


@dataclass(frozen=True)
class Leftover:
    """A file that a finished cache does not need.

    Attributes:
        path: The file.
        reason: Why it is not needed.
        size: Its bytes.
    """

    path: Path
    reason: str
    size: int


def leftovers(folder: Path, delete: bool = False) -> list[Leftover]:
    """Find, and if asked for delete, what a finished cache does not need.

    Unfinished files of killed launches, shards of which neither a commit nor the index tells, and
    commits that were set aside. Files with other names are left alone.
    The launch's lock is held until the last file is deleted: a launch that starts meanwhile is
    refused, and none that runs can lose a shard.

    Args:
        folder: The cache.
        delete: Delete what is found.

    Returns:
        What was found.

    Raises:
        CacheError: While a launch is filling the cache; where locks do not work, also when asked to
            delete, since that cannot be known there.
    """
    Manifest.load(folder)  # refuses a folder that is no cache
    lock = LaunchLock(folder)
    with lock:
        if delete:
            lock.take_alone()
        else:
            lock.take()
        found = list(_unneeded(folder))
        # The list may come from a directory that lags behind: before each deletion the commit is
        # asked for by its name.
        kept = [item for item in found if not _is_needed(folder, item.path)]
        if delete:
            for item in kept:
                if not _is_needed(folder, item.path):
                    item.path.unlink(missing_ok=True)
        return kept


def _unneeded(folder: Path) -> Iterator[Leftover]:
    wanted = {read_commit(folder, unit)["shard"] for unit in committed_units(folder)}
    # Whoever reads by an index that is there needs its shards.
    with contextlib.suppress(CacheError):
        wanted.update(Index(folder).units.shards)
    for place in (folder, folder / SHARDS, folder / COMMITS):
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            reason = None
            if path.name.startswith(TEMPORARY):
                reason = "unfinished file of a killed launch"
            elif path.name.endswith(_RELEASED):
                reason = "commit set aside by verify --release"
            elif (
                place.name == SHARDS
                and unit_of_shard(path.name) is not None
                and path.name not in wanted
            ):
                reason = "shard without a commit"
            if reason is not None:
                yield Leftover(path, reason, path.stat().st_size)


def _is_needed(folder: Path, path: Path) -> bool:
    """Whether a shard's commit is there after all."""
    unit = unit_of_shard(path.name)
    if path.parent.name != SHARDS or unit is None:
        return False
    return is_committed(folder, unit) and read_commit(folder, unit)["shard"] == path.name


def redo_command(manifest: Manifest) -> str:
    """The command that goes on with a cache."""
    return manifest.command or "the command that made the cache"
