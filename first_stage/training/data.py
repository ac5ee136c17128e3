"""What a run needs before it begins: the accelerator and the data."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from first_stage.config.schema import Config, reading_problems
from first_stage.data import (
    Batch,
    Inventory,
    Source,
    TrainingStream,
    fingerprint,
    is_builtin,
    open_inventory,
    spare_workers,
    split_source,
    take_inventory,
    training_loader,
)
from first_stage.data.checks import large_enough, only_large, refuse_shared
from first_stage.data.shard_stream import ShardLoader, ShardStream, StreamSource, split_stream
from first_stage.data.shards import Shard, ShardedRows, count_rows, find_shards, shards_of
from first_stage.distributed.memory import keep_freed_memory
from first_stage.distributed.processes import Processes, on_main, shared
from first_stage.errors import ConfigError, DataError
from first_stage.files import writing
from first_stage.models.first_stage import FirstStage
from first_stage.training.log import tracker_of
from first_stage.training.run_folder import INVENTORY, SHARDS
from first_stage.training.step import Trainer

_ANY = None
"""Of a data set of its own, the only split there is."""


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator, which joins the job's processes.

    Raises:
        ConfigError: When precision or tracker cannot be had here.
    """
    tracker, remark = tracker_of(config.train.tracker)
    # What torch offers instead would still copy buffers at the start, which is as good here, but
    # versions before 2.13 do not have it.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.precision,
            log_with=tracker,
            project_dir=config.output_dir,
            # Buffers never differ between processes, and copying them in the critic's second
            # forward pass would change what its first one saved for the backward pass.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    except ValueError as error:
        raise ConfigError(
            f"train.precision {config.train.precision!r} cannot be used: {error}"
        ) from error
    if remark and accelerator.is_main_process:
        print(remark, flush=True)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    # Crops of one size, step after step: trying the algorithms once pays.
    torch.backends.cudnn.benchmark = True
    return accelerator


def open_data(
    config: Config,
    processes: Processes | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Source, Source | None]:
    """The samples to train on, and the held-out ones if there are any.

    Files are listed and rows counted by the first process, for all.

    Args:
        config: The run's configuration.
        processes: Those of the run.
        say: Called with lines for the user: what was found, and what was left out.

    Raises:
        DataError: When there are no images, or held-out ones are trained on.
    """
    data, processes = config.data, processes or Processes()
    opener = _Opener(config, processes, say)
    held_out: Source | None = None
    if data.validation_path is not None:
        split = data.validation_split or _ANY
        held_out = opener.open(data.validation_path, "validation", split, "held_out.txt")
    elif data.validation_split is not None:
        held_out = opener.open(data.path, "validation", data.validation_split, "held_out.txt")
    share = data.validation_share if held_out is None else 0.0
    training: Source
    if data.streaming:
        training, spread = split_stream(opener.rows(data.path, data.split), share)
        held_out = spread if held_out is None else held_out
    elif is_builtin(data.path):
        training = opener.open(data.path, "train", data.split, INVENTORY)
        if held_out is None:
            held_out = opener.open(data.path, "validation", data.split, INVENTORY)
    else:
        training = opener.open(data.path, "train", data.split, INVENTORY)
        if share:
            return split_source(training, share, config.seed)
    if held_out is not None and share == 0.0 and not is_builtin(data.path):
        found: Source = held_out
        on_main(processes, lambda: refuse_shared(training, found))
    return training, held_out


class _Opener:
    """Opens data for all processes.

    Args:
        config: The run's configuration.
        processes: Those of the run.
        say: Called with lines for the user.
    """

    def __init__(self, config: Config, processes: Processes, say: Callable[[str], None]):
        self.config, self.processes, self.say = config, processes, say
        self.folder = Path(config.output_dir)

    def open(self, path: str, part: Any, split: str | None, file: str) -> Source:
        """Samples that are read one by one; `file` of the run lists the files."""
        inventory = shared(self.processes, lambda: take_inventory(path, split))
        column = self.config.data.image_column
        source = open_inventory(inventory, column, part, split, self.say)
        if inventory.kind in ("images", "parquet", "tar"):
            on_main(self.processes, lambda: self._write(inventory, file))
        if least := self.config.data.min_side:
            chosen = shared(self.processes, lambda: large_enough(source, least))
            return only_large(source, chosen, least, self.say)
        return source

    def rows(self, path: str, split: str | None) -> ShardedRows:
        """The rows of shards that are streamed."""
        shards = shared(self.processes, lambda: self._count(path, split))
        for shard in shards:
            if shard.problem:
                self.say(f"{shard.name}: {shard.problem}; its first {shard.rows:,} are used")
        column = self.config.data.image_column
        return ShardedRows(path, shards, column, max(self.config.train.batch_size, 1))

    def _count(self, path: str, split: str | None) -> list[Shard]:
        root: str | None = None
        if "://" not in path and (inventory := take_inventory(path, split)).kind != "hub":
            urls, root = shards_of(inventory), os.fsdecode(inventory.root)
            self._write(inventory, INVENTORY)
            for line in inventory.lines():
                self.say(line)
        else:
            urls = find_shards(path, split)
        with writing(self.folder, lambda: "Nothing was trained yet"):
            return count_rows(urls, self.folder / SHARDS, root)

    def _write(self, inventory: Inventory, file: str) -> None:
        with writing(self.folder, lambda: "Nothing was trained yet"):
            inventory.write(self.folder / file)


def agreed_fingerprint(config: Config, source: Source, processes: Processes) -> str:
    """The data's fingerprint; on several machines each may have its own copy.

    Raises:
        DataError: When the processes do not see the same samples.
    """
    prints = processes.gather(fingerprint(source))
    for rank, other in enumerate(prints):
        if other != prints[0]:
            raise DataError(
                f"data.path {config.data.path!r} is not the same everywhere: process {rank} sees "
                "other samples than process 0. Give all machines the same files"
            )
    return str(prints[0])


def open_stream(config: Config, source: Source, stage: FirstStage) -> TrainingStream:
    """The stream of training samples, for a first stage.

    Args:
        config: The run's configuration.
        source: The samples, from `open_data`.
        stage: Says how many channels, and how much posterior noise.
    """
    view = config.view
    sides = [stage.latent_shape(side) for side in view.size]
    latent_shape = (sides[0][0], sides[0][1], sides[1][2])
    reading = config.data.reading(stage.in_channels)
    for problem in reading_problems(reading):
        raise ConfigError(problem)
    random_crop, flip = config.data.crop == "random", config.data.flip
    if isinstance(source, StreamSource):
        return ShardStream(
            source, view, reading, config.seed, latent_shape, config.train.batch_size,
            config.data.shuffle_buffer, random_crop, flip,
        )  # fmt: skip
    return TrainingStream(source, view, reading, config.seed, latent_shape, random_crop, flip)


def open_loader(
    config: Config, stream: TrainingStream, positions: Iterable[list[int]], pin_memory: bool
) -> Iterable[Batch]:
    """Decode the samples at these positions, one list per micro-batch, in workers.

    Args:
        config: The run's configuration.
        stream: From `open_stream`.
        positions: Those of this process.
        pin_memory: Copy batches to page-locked memory, for a GPU.
    """
    workers = config.data.workers
    if workers is None:
        workers = spare_workers()
    if isinstance(stream, ShardStream):
        per_step = getattr(positions, "micro_batches", 1)
        return ShardLoader(stream, positions, per_step, workers, pin_memory)
    return training_loader(stream, positions, workers, pin_memory)


def introduction(trainer: Trainer, micro: int, samples: int, held_out: int) -> str:
    """What a run says of itself before it begins.

    Args:
        trainer: Its trainer.
        micro: Images per forward pass of a process.
        samples: Images to train on.
        held_out: Images held out.
    """
    config, stage = trainer.config, trainer.first_stage.network
    world = trainer.processes.world
    sizes = f"first stage of {_millions(stage)} parameters"
    if trainer.critic is not None:
        sizes += f", critic of {_millions(trainer.critic.network)}"
    return (
        f"{'1 process' if world == 1 else f'{world} processes'} on "
        f"{_device(trainer)}, precision {config.train.precision}, batch of "
        f"{config.train.batch_size} in micro-batches of {micro}\n"
        f"{samples:,} images to train on, {held_out:,} held out, from {config.data.path}\n"
        f"{sizes}, f{stage.downsample_factor}, {stage.latent_channels} latent channels"
        f"{_phases(config)}"
    )


def _phases(config: Config) -> str:
    """From where on only the decoder learns; nothing where the encoder does to the end."""
    steps = config.train.encoder_steps
    if steps is None or steps >= config.train.max_steps:
        return ""
    return f"; the decoder learns alone {f'from step {steps:,} on' if steps else 'from the start'}"


def _device(trainer: Trainer) -> str:
    """The device, and on a CPU what of it is used: accelerate gives a process one thread."""
    device, world = trainer.accelerator.device.type, trainer.processes.world
    if device != "cpu":
        return device
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"cpu with {threads} thread{'s' if threads > 1 else ''}{' each' if world > 1 else ''}"
    if (more := cores // world) > threads:
        text += f" (OMP_NUM_THREADS={more} would use all {cores} cores)"
    return text


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
