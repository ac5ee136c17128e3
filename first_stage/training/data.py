"""What a run needs before it begins: the accelerator and the data."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from first_stage.config.schema import DataConfig, TrainConfig
from first_stage.data import (
    Batch,
    Inventory,
    Later,
    Source,
    TrainingStream,
    fingerprint,
    flip_named,
    is_builtin,
    spare_workers,
    split_source,
    take_inventory,
    training_loader,
)
from first_stage.data.find_shards import find_shards, shards_of
from first_stage.data.overlap import refuse_shared
from first_stage.data.paired import LatentStore, PairedLatents
from first_stage.data.shard_stream import ShardLoader, ShardStream, StreamSource, split_stream
from first_stage.data.shards import Shard, ShardedRows, count_rows
from first_stage.distributed.accelerator import make_plain_accelerator
from first_stage.distributed.memory import keep_freed_memory
from first_stage.distributed.processes import Processes, on_main, shared
from first_stage.errors import ConfigError, DataError
from first_stage.files import FILE_LIST, writing
from first_stage.metrics.precision import use_tf32
from first_stage.models.first_stage import FirstStage
from first_stage.training.log import tracker_of
from first_stage.training.run_folder import SHARDS

_ANY = None
"""Of a data set of its own, the only split there is."""


def make_accelerator(train: TrainConfig, output_dir: str) -> Accelerator:
    """The accelerator, which joins the job's processes.

    Args:
        train: Says the precision and the tracker.
        output_dir: Where the tracker writes.

    Raises:
        ConfigError: When precision or tracker cannot be had here.
    """
    tracker, remark = tracker_of(train.tracker)
    # What torch offers instead would still copy buffers at the start, which is as good here, but
    # versions before 2.13 do not have it.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    try:
        accelerator = make_plain_accelerator(
            train.precision,
            log_with=tracker,
            project_dir=output_dir,
            # Buffers never differ between processes, and copying them in the critic's second
            # forward pass would change what its first one saved for the backward pass.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    except ValueError as error:
        raise ConfigError(f"train.precision {train.precision!r} cannot be used: {error}") from error
    if remark and accelerator.is_main_process:
        print(remark, flush=True)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.device.type == "cuda":
        use_tf32(train.tf32)
    # Crops of one size, step after step: trying the algorithms once pays.
    torch.backends.cudnn.benchmark = True
    return accelerator


def open_data(
    data: DataConfig,
    *,
    seed: int,
    batch_size: int,
    folder: Path,
    processes: Processes | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Source, Source | None]:
    """The samples to train on, and the held-out ones if there are any.

    Files are listed and rows counted by the first process, for all.

    Args:
        data: Which, and how they are divided.
        seed: Of the division.
        batch_size: Images per step; a stream holds as many rows ready.
        folder: The run's, which remembers the rows of a stream's shards and lists the files.
        processes: The first one lists files and counts rows for all.
        say: Called with lines for the user: what was found, and what was left out.

    Raises:
        DataError: When there are no images, or held-out ones are trained on.
    """
    processes = processes or Processes()
    opener = _Opener(data, folder, processes, say)
    held_out: Source | None = None
    if data.validation_path is not None:
        split = data.validation_split or _ANY
        with _told_of("validation_path", "validation_split"):
            held_out = opener.open(data.validation_path, "validation", split, "held_out.txt")
    elif data.validation_split is not None:
        with _told_of("path", "validation_split"):
            held_out = opener.open(data.path, "validation", data.validation_split, "held_out.txt")
    share = data.validation_share if held_out is None else 0.0
    training: Source
    if data.streaming:
        rows = opener.rows(data.path, data.split, batch_size)
        training, spread = split_stream(rows, share)
        held_out = spread if held_out is None else held_out
    elif is_builtin(data.path):
        training = opener.open(data.path, "train", data.split, FILE_LIST)
        if held_out is None:
            held_out = opener.open(data.path, "validation", data.split, FILE_LIST)
    else:
        training = opener.open(data.path, "train", data.split, FILE_LIST)
        if share:
            return split_source(training, share, seed)
    if held_out is not None and share == 0.0 and not is_builtin(data.path):
        found: Source = held_out
        on_main(processes, lambda: refuse_shared(training, found))
    return training, held_out


@contextlib.contextmanager
def _told_of(path: str, split: str) -> Iterator[None]:
    """What is wrong with data is told of `data.path` and `data.split`: here of other fields."""
    fields = {"data.path": f"data.{path}", "data.split": f"data.{split}"}
    quoted_or_field = r"""'[^']*'|"[^"]*"|\bdata\.(?:path|split)\b"""
    try:
        yield
    except DataError as error:
        told = re.sub(quoted_or_field, lambda found: fields.get(found[0], found[0]), str(error))
        raise DataError(told) from error


class _Opener:
    """Opens data for all processes.

    Args:
        data: How.
        folder: The run's, for lists and counts.
        processes: Those of the run.
        say: Called with lines for the user.
    """

    def __init__(
        self, data: DataConfig, folder: Path, processes: Processes, say: Callable[[str], None]
    ):
        self.data, self.folder, self.processes, self.say = data, folder, processes, say

    def _once(self, make: Callable[[], Any]) -> Any:
        with writing(self.folder, lambda: "Nothing was trained yet"):
            return shared(self.processes, make)

    def open(self, path: str, part: Any, split: str | None, file: str) -> Source:
        """Samples that are read one by one; `file` of the run lists the files."""

        def keep(inventory: Inventory) -> None:
            inventory.write(self.folder / file)

        return self.data.open_at(path, part, split, say=self.say, once=self._once, keep=keep)

    def rows(self, path: str, split: str | None, batch_size: int) -> ShardedRows:
        """The rows of shards that are streamed."""
        shards = self._once(lambda: self._count(path, split))
        for shard in shards:
            if shard.problem:
                self.say(f"{shard.name}: {shard.problem}; its first {shard.rows:,} are used")
        return ShardedRows(path, shards, self.data.image_column, batch_size)

    def _count(self, path: str, split: str | None) -> list[Shard]:
        root: str | None = None
        if "://" not in path and (inventory := take_inventory(path, split)).kind != "hub":
            urls, root = shards_of(inventory), os.fsdecode(inventory.root)
            inventory.write(self.folder / FILE_LIST)
            for line in inventory.lines():
                self.say(line)
        else:
            urls = find_shards(path, split)
        return count_rows(urls, self.folder / SHARDS, root)


def agreed_fingerprint(source: Source, processes: Processes) -> str:
    """The data's fingerprint; on several machines each may have its own copy.

    Raises:
        DataError: When the processes do not see the same samples.
    """
    prints = processes.gather(fingerprint(source))
    for rank, other in enumerate(prints):
        if other != prints[0]:
            raise DataError(
                f"data.path {source.name!r} is not the same everywhere: process {rank} sees "
                "other samples than process 0. Give all machines the same files"
            )
    return str(prints[0])


def open_stream(
    source: Source,
    data: DataConfig,
    latents: PairedLatents | None = None,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    late_start: int | None = None,
) -> TrainingStream:
    """The stream of training samples, for a first stage.

    Args:
        source: The samples, from `open_data`.
        data: How they are seen.
        latents: What the encoder once gave for them, from `pair_latents`.
        channels: To read files into.
        seed: Of order and views.
        batch_size: Images per step.
        late_start: The first step of larger crops, as `Config.late_start` has it.
    """
    view, reading = data.view(data.resolution), data.reading(channels)
    variation, later = data.variation(), None
    if late_start is not None and data.late_resolution is not None:
        later = Later(late_start * batch_size, data.view(data.late_resolution))
    if isinstance(source, StreamSource):
        return ShardStream(
            source, view, reading, seed, batch_size, data.shuffle_buffer, variation, later
        )
    return TrainingStream(source, view, reading, seed, variation, latents, later)


def pair_latents(
    latents: LatentStore | None, source: Source, data: DataConfig, stage: FirstStage
) -> PairedLatents | None:
    """The latents of the samples, where `data.latents` names some.

    Args:
        latents: What opens them.
        source: The samples.
        data: How they are seen.
        stage: The first stage that must have made them.

    Raises:
        UserError: When latents and samples cannot be paired.
    """
    if data.latents is None:
        return None
    if latents is None:
        raise ConfigError(
            f"data.latents is {data.latents!r}, but train() was given no latents: from Python, "
            "train(config, CachedLatents(config.data.latents)) with latent_tools' class"
        )
    return latents.pair(
        stage.model,
        source,
        reading=data.reading(stage.in_channels),
        view=data.view(data.resolution),
        flips=flip_named(data.flip) != "none",
        missing=data.max_broken,
    )


def open_loader(
    stream: TrainingStream,
    positions: Iterable[list[int]],
    *,
    workers: int | None,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Decode the samples at these positions, one list per micro-batch, in workers.

    Args:
        stream: From `open_stream`.
        positions: Those of this process.
        workers: How many; `None`: one per core left over.
        pin_memory: Copy batches to page-locked memory, for a GPU.
    """
    if workers is None:
        workers = spare_workers()
    if isinstance(stream, ShardStream):
        per_step = getattr(positions, "micro_batches", 1)
        return ShardLoader(stream, positions, per_step, workers, pin_memory)
    return training_loader(stream, positions, workers, pin_memory)
