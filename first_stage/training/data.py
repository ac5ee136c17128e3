"""What a run needs before it begins: the accelerator and the data."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from first_stage.config.schema import DataConfig, TrainConfig
from first_stage.data import (
    Batch,
    Source,
    TrainingStream,
    fingerprint,
    is_builtin,
    open_source,
    spare_workers,
    split_source,
    training_loader,
)
from first_stage.data.shard_stream import ShardLoader, ShardStream, StreamSource, split_stream
from first_stage.data.shards import Shard, ShardedRows, count_rows, find_shards
from first_stage.distributed.memory import keep_freed_memory
from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError, DataError, UserError
from first_stage.files import writing
from first_stage.training.log import tracker_of
from first_stage.training.run_folder import SHARDS


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
        accelerator = Accelerator(
            mixed_precision=train.precision,
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
) -> tuple[Source, Source | None]:
    """The samples to train on, and the held-out ones if there are any.

    Args:
        data: Which, and how they are divided.
        seed: Of the division.
        batch_size: Images per step; a stream holds as many rows ready.
        folder: The run's, which remembers the rows of a stream's shards.
        processes: The first one counts the rows of a stream's shards for all.
    """

    def opened(path: str, split: Any) -> Source:
        return open_source(path, data.image_column, split, data.split)

    held_out = None
    if data.validation_path is not None:
        held_out = opened(data.validation_path, "validation")
    if data.streaming:
        counted = _count_shards(data, folder, processes or Processes())
        rows = ShardedRows(data.path, counted, data.image_column, batch_size)
        share = data.validation_share if held_out is None else 0.0
        training, spread = split_stream(rows, share)
        return training, spread if held_out is None else held_out
    if held_out is not None:
        return opened(data.path, "train"), held_out
    if is_builtin(data.path):
        return opened(data.path, "train"), opened(data.path, "validation")
    source = opened(data.path, "all")
    if data.validation_share == 0:
        return source, None
    return split_source(source, data.validation_share, seed)


def _count_shards(data: DataConfig, folder: Path, processes: Processes) -> list[Shard]:
    shards: list[Shard] = []

    def count() -> None:
        urls = find_shards(data.path, data.split)
        with writing(folder, lambda: "Nothing was trained yet"):
            shards.extend(count_rows(urls, folder / SHARDS))

    on_main(processes, count)
    return list(processes.gather(shards)[0])


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
    source: Source, data: DataConfig, *, channels: int, seed: int, batch_size: int
) -> TrainingStream:
    """The stream of training samples, for a first stage.

    Args:
        source: The samples, from `open_data`.
        data: How they are seen.
        channels: To read files into.
        seed: Of order, crops and flips.
        batch_size: Images per step.
    """
    view = data.view(data.resolution)
    random_crop = data.crop == "random"
    if isinstance(source, StreamSource):
        return ShardStream(
            source, view, channels, seed, batch_size, data.shuffle_buffer, random_crop, data.flip
        )
    return TrainingStream(source, view, channels, seed, random_crop, data.flip)


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


def on_main(processes: Processes, work: Callable[[], None]) -> None:
    """Do something on the main process; what goes wrong there in words is raised on all.

    Raises:
        UserError: What the main process met.
    """
    problem: str | None = None
    if processes.is_main:
        try:
            work()
        except UserError as error:
            problem = str(error)
    told = processes.gather(problem)[0]
    if told is not None:
        raise UserError(told)
