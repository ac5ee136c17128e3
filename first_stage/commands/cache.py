"""The command `first-stage cache`: reads its options, precomputes, and says what to do next."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from first_stage.command_line import command_line
from first_stage.config.images import ImagesConfig, shorter_side
from first_stage.config.parsing import read_options
from first_stage.config.types import NonNegativeInt, PositiveInt, Share
from first_stage.data import Inventory, Source, cache_workers, take_inventory
from first_stage.data.checks import value_remark
from first_stage.distributed.memory import keep_freed_memory
from first_stage.distributed.processes import Processes, shared
from first_stage.errors import ConfigError
from first_stage.files import FILE_LIST, writing
from first_stage.models.loading import load_autoencoder, training_resolution
from latent_tools.build.launch import Outcome, Process, precompute
from latent_tools.build.options import CacheOptions, EncodingOptions
from latent_tools.build.parquet import ParquetStream
from latent_tools.format.manifest import Manifest

# A launch waits at its start until the first process has read the sizes of all images.
_PLANNING_TIME = timedelta(days=2)


@dataclass(frozen=True)
class CacheData(ImagesConfig):
    """Which images, and how they are seen."""

    path: str = ""
    resolution: PositiveInt | None = None
    """Side of the square centre crop, in pixels; with buckets, of the square whose area they have;
    null: the first stage's training resolution."""
    resize: NonNegativeInt | None = None
    """Shorter side after resizing, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size. An image smaller than the crop is always enlarged to fit. Buckets
    do not use it."""
    split: str = "train"
    streaming: bool = False
    """Read parquet files where they are, a row group at a time, instead of copying them: for data
    larger than the disk. path may then be any address that fsspec knows (hf://, s3://)."""
    workers: NonNegativeInt | None = None
    """Decoding processes per encoding process; null: on GPUs all of the machine's cores, divided
    over its processes; on CPUs one per core left over; 0: none."""
    max_broken: Share = 0.05
    """Share of samples that may be unreadable before the launch stops; they are listed in
    failures.parquet."""


@dataclass(frozen=True)
class Places:
    """What is encoded, with what, and where the latents go."""

    first_stage: str = ""
    """A diffusers autoencoder: the folder of an export, a pipeline's folder, or a hub id."""
    output: str = ""
    """The cache's folder. It is made when it is not there, and continued when it is."""
    data: CacheData = field(default_factory=CacheData)


@dataclass(frozen=True)
class Options(EncodingOptions, Places):
    """Precompute the latents of a data set."""


_SWITCHES = {
    "--flip": "true",
    "--compile": "true",
    "--update": "true",
    "--data.streaming": "true",
    "--buckets": "auto",
}
"""What these flags mean without a value."""


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    options = read_options(
        Options,
        arguments,
        _SWITCHES,
        "Precompute the latents of a data set: exactly once each, resumable, tied to the weights "
        "of the first stage.",
    )
    for name, value in (
        ("first_stage", options.first_stage),
        ("data.path", options.data.path),
        ("output", options.output),
    ):
        if not value:
            raise ConfigError(f"--{name} is missing: see --help")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command on this process of a launch.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_options(given)
    process = _this_process()

    def say(line: str) -> None:
        if process.rank == 0:
            print(line, flush=True)

    count = process.world
    say(f"{count} process{'es' if count > 1 else ''} on {process.device.type}")
    autoencoder = load_autoencoder(options.first_stage, options.revision, "--first_stage")
    found: list[Inventory] = []
    source = _open(options.data, say, found)
    cache_options = _cache_options(options, autoencoder, process, command_line("cache", *given))
    if process.rank == 0 and (remark := value_remark(source, cache_options.reading)):
        say(remark)
    kept = "Complete units are kept: start the same command to go on"
    try:
        with writing(Path(options.output), lambda: kept):
            outcome = precompute(
                autoencoder, options.first_stage, source, options.output, cache_options, process,
                say, lambda: _keep(found, Path(options.output)),
            )  # fmt: skip
    except KeyboardInterrupt:
        say("stopped; the units that are complete are kept: start the same command to go on")
        sys.exit(130)
    _report(options, outcome, process)


def _keep(found: list[Inventory], folder: Path) -> None:
    for inventory in found:
        inventory.write(folder / FILE_LIST)


def _open(data: CacheData, say: Callable[[str], None], found: list[Inventory]) -> Source:
    processes = Processes()

    def once(make: Callable[[], Any]) -> Any:
        return shared(processes, make)

    is_streamed = "://" in data.path
    if data.streaming and not is_streamed:
        inventory = once(lambda: take_inventory(data.path, data.split))
        is_streamed = inventory.kind in ("parquet", "hub")
        if inventory.kind == "parquet":
            found.append(inventory)
            for line in inventory.lines():
                say(line)
    if not is_streamed:
        return data.open("all", say=say, once=once, keep=found.append)
    if data.min_side:
        raise ConfigError("data.min_side needs all sizes first: set data.streaming to false")
    return ParquetStream(data.path, data.image_column, data.split)


def _this_process() -> Process:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The encoder brings its own autocast: --precision decides, not the launcher's mixed precision.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=_PLANNING_TIME)]
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # On machines without a GPU accelerate overlooks a launch of several processes.
        raise ConfigError(
            f"the launcher started {started} processes, but each runs on its own: set the "
            "environment variable ACCELERATE_USE_CPU=true to use several processes on CPUs"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return Process(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        accelerator.wait_for_everyone,
        Processes().broadcast,
    )


def _cache_options(
    options: Options, autoencoder: Any, process: Process, command: str
) -> CacheOptions:
    data = options.data
    resolution = data.resolution
    if resolution is None:
        resolution = training_resolution(options.first_stage, autoencoder, options.revision)
        if resolution is None:
            raise ConfigError(
                "--data.resolution is missing, and the first stage does not say what it was "
                "trained on"
            )
    reading = data.reading(int(getattr(autoencoder.config, "in_channels", 3)))
    buckets = options.buckets
    if data.crop_shape is not None:
        if buckets is not None:
            raise ConfigError(
                f"--data.crop_shape {list(data.crop_shape)} beside --buckets {buckets}: give one"
            )
        buckets = "x".join(map(str, data.crop_shape))
    if buckets == "kohya":
        reading = dataclasses.replace(reading, upright=False)
    return CacheOptions(
        resolution=resolution,
        resize=shorter_side(data.resize, resolution),
        reading=reading,
        workers=cache_workers(process.device) if data.workers is None else data.workers,
        max_broken=data.max_broken,
        opened_with={
            "image_column": data.image_column,
            "split": data.split,
            "streaming": data.streaming,
        },
        command=command,
        **{f.name: getattr(options, f.name) for f in fields(EncodingOptions)}
        | {"buckets": buckets},
    )


def _report(options: Options, outcome: Outcome, process: Process) -> None:
    who = f"process {process.rank}: " if process.world > 1 else ""
    print(
        f"{who}{outcome.images} samples in {outcome.units} units encoded, {outcome.already} of "
        f"{outcome.planned} units were done before",
        flush=True,
    )
    if outcome.retried:
        print(f"{who}{outcome.retried} samples were encoded again in float32", flush=True)
    if outcome.batch_size < options.batch_size:
        print(f"{who}the batch fits with {outcome.batch_size} images", flush=True)
    if outcome.is_complete:
        print(_summary(options.output), flush=True)


def _summary(output: str) -> str:
    manifest = Manifest.load(Path(output))
    counts, lines = manifest.counts, []
    lines.append(
        f"{counts['samples']} samples, {counts['bytes'] / 2**20:.1f} MiB in {counts['units']} "
        f"units: {output}"
    )
    if counts["failures"]:
        lines.append(
            f"{counts['failures']} samples failed: {Path(output, 'failures.parquet')} says why"
        )
    lines.append(
        f"next: {command_line('latents', 'info', output)}, or in Python "
        f"latent_tools.LatentDataset({output!r})"
    )
    return "\n".join(lines)
