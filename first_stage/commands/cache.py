"""The command `cache_latents`: reads its options, precomputes, and says what to do next."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from first_stage.config.parsing import read_options
from first_stage.data import Source, open_source, spare_workers
from first_stage.distributed.memory import keep_freed_memory
from first_stage.errors import ConfigError
from first_stage.models.first_stage import load_autoencoder
from latent_tools.build.launch import Outcome, Process, precompute
from latent_tools.build.options import CacheOptions, Dtype, Precision, Representation
from latent_tools.build.parquet import ParquetStream
from latent_tools.format.manifest import Manifest

# A launch waits at its start until the first process has read the sizes of all images.
_PLANNING_TIME = timedelta(days=2)


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are seen."""

    path: str = ""
    """A folder of images (nested or not), a folder written by datasets' save_to_disk, parquet or
    WebDataset (.tar) shards or a folder of them, a built-in set (photos, digits), or a data set id
    on the Hugging Face hub."""
    resolution: int | None = None
    """Side of the square centre crop, in pixels; with buckets, of the square whose area they have;
    null: the first stage's training resolution."""
    resize: int | None = None
    """Shorter side after resizing, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size. An image smaller than the crop is always enlarged to fit. Buckets
    do not use it."""
    image_column: str | None = None
    """Column with the images, for data sets that have columns; null: found by its type."""
    split: str = "train"
    """Which split of a hub or saved data set."""
    streaming: bool = False
    """Read parquet files where they are, a row group at a time, instead of copying them: for data
    larger than the disk. path may then be any address that fsspec knows (hf://, s3://)."""
    workers: int | None = None
    """Decoding processes per encoding process; null: on GPUs all of the machine's cores, divided
    over its processes; on CPUs one per core left over, at most 8; 0: none."""
    max_broken: float = 0.05
    """Share of samples that may be unreadable before the launch stops; they are listed in
    failures.parquet."""


@dataclass(frozen=True)
class Options:
    """Precompute the latents of a data set."""

    first_stage: str = ""
    """A diffusers autoencoder: the folder of an export, a pipeline's folder, or a hub id."""
    output: str = ""
    """The cache's folder. It is made when it is not there, and continued when it is."""
    data: DataOptions = field(default_factory=DataOptions)
    """Which images, and how they are seen."""
    revision: str | None = None
    """Revision of the first stage on the hub."""
    representation: Representation | None = None
    """What is stored: the posterior's moments (mean and log-variance), its mean, or one sample;
    null: moments, or the latents of a first stage without a posterior."""
    dtype: Dtype = "float16"
    """What it is stored as. uint8 spreads 256 levels over each sample's and channel's range; the
    error is measured and stands in the manifest."""
    flip: bool = False
    """Encode the images flipped left to right too."""
    buckets: str | None = None
    """Shapes for images of several aspect ratios: auto, or heights and widths as in
    256x256,320x192; null: one square."""
    columns: list[str] | None = None
    """Columns to carry along, as in [label,caption]; null: label, class and caption under their
    usual names."""
    precision: Precision = "no"
    """Autocast type of the encoder; no: float32."""
    batch_size: int = 32
    """Images per forward pass of one process; halved when the memory runs out."""
    unit_size: int = 0
    """Images per unit: what is written at once, and encoded again after a kill; 0: as many as 256
    MiB hold, at most 1024."""
    compile: bool = False
    """Compile the encoder, once per shape."""
    seed: int = 0
    """Seed of the draws when representation is sample."""


_SWITCHES = {
    "--flip": "true",
    "--compile": "true",
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
    options = parse_options(arguments)
    process = _this_process()

    def say(line: str) -> None:
        if process.rank == 0:
            print(line, flush=True)

    count = process.world
    say(f"{count} process{'es' if count > 1 else ''} on {process.device.type}")
    autoencoder = load_autoencoder(options.first_stage, options.revision)
    source = _open(options.data)
    cache_options = _cache_options(options, autoencoder, process)
    try:
        outcome = precompute(
            autoencoder, options.first_stage, source, options.output, cache_options, process, say
        )
    except KeyboardInterrupt:
        say("stopped; the units that are complete are kept: start the same command to go on")
        sys.exit(130)
    _report(options, outcome, process)


def _open(data: DataOptions) -> Source:
    if data.streaming:
        return ParquetStream(data.path, data.image_column, data.split)
    return open_source(data.path, data.image_column, "all", data.split)


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
        lambda numbers: _handed_over(numbers, accelerator.device),
    )


def _handed_over(numbers: list[int], device: torch.device) -> list[int]:
    """What the first process calls this with, on every process."""
    from accelerate.utils import broadcast

    count: Any = broadcast(torch.tensor(len(numbers), device=device))
    values = torch.zeros(int(count), dtype=torch.int64, device=device)
    if len(numbers) == len(values):
        values = torch.tensor(numbers, dtype=torch.int64, device=device)
    handed: Any = broadcast(values)
    return [int(number) for number in handed.tolist()]


def _cache_options(options: Options, autoencoder: Any, process: Process) -> CacheOptions:
    resolution = options.data.resolution
    if resolution is None:
        resolution = getattr(autoencoder.config, "sample_size", None)
        if not isinstance(resolution, int) or resolution < 1:
            raise ConfigError(
                "--data.resolution is missing, and the first stage's config has no sample_size"
            )
    resize = options.data.resize
    if not 0.0 <= options.data.max_broken <= 1.0:
        raise ConfigError(f"data.max_broken is {options.data.max_broken}; a share lies in [0, 1]")
    return CacheOptions(
        resolution=resolution,
        resize=resolution if resize is None else (resize or None),
        representation=options.representation,
        dtype=options.dtype,
        flip=options.flip,
        buckets=options.buckets,
        columns=tuple(options.columns) if options.columns is not None else None,
        precision=options.precision,
        batch_size=options.batch_size,
        unit_size=options.unit_size,
        workers=_workers(options.data.workers, process),
        max_broken=options.data.max_broken,
        compile=options.compile,
        seed=options.seed,
        revision=options.revision,
        opened_with={
            "image_column": options.data.image_column,
            "split": options.data.split,
            "streaming": options.data.streaming,
        },
        command=shlex.join(["accelerate", "launch", *sys.argv]),
    )


def _workers(wanted: int | None, process: Process) -> int:
    if wanted is not None:
        return wanted
    if process.device.type == "cpu":
        # The encoder's threads are busy all the time: a worker beside them slows both.
        return spare_workers(torch.get_num_threads())
    # A GPU's process waits for its device: all of its cores decode.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
        f"next: python -m latent_tools info {shlex.quote(output)}, or in Python "
        f"latent_tools.LatentDataset({output!r})"
    )
    return "\n".join(lines)
