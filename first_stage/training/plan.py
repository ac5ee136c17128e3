"""What a run would do and cost, told from a few timed steps; nothing is trained."""

import contextlib
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from first_stage.config.checks import check, factor_problems, micro_batch_size
from first_stage.config.schema import Config
from first_stage.data import Batch, StepSampler, start_loader
from first_stage.data.paired import LatentStore
from first_stage.distributed.processes import Processes, end_with_launcher, on_main, shared
from first_stage.errors import ConfigError
from first_stage.files import make_writable
from first_stage.training import run_folder as files
from first_stage.training.data import (
    make_accelerator,
    open_data,
    open_loader,
    open_stream,
    pair_latents,
)
from first_stage.training.introduction import Phase, draw_first_batch, introduction, phases
from first_stage.training.start_from import as_started, built_for, find_origin
from first_stage.training.step import Trainer

_TIMED_STEPS = 3
_PATIENCE = 10.0
"""Seconds after which a phase's first step is taken for all of its steps."""


@dataclass
class Timings:
    """What timed steps cost.

    Attributes:
        seconds: Per step, for each phase.
        waited: Share of the time that was spent waiting for data.
        broken: Ids and reasons of images that could not be decoded.
        looked_at: Ids of the images that were taken.
    """

    seconds: list[float] = field(default_factory=list)
    waited: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)
    looked_at: set[str] = field(default_factory=set)


def plan(config: Config, latents: LatentStore | None = None) -> None:
    """Print what a run would do, and what it would cost here.

    Args:
        config: The run's configuration. In a launched job every process calls this.
        latents: As in `train`.

    Raises:
        UserError: For anything in the configuration or data that cannot work.
    """
    check(config)
    end_with_launcher()
    accelerator = make_accelerator(config.train, config.output_dir)
    processes = Processes(config.train.process_timeout)
    with processes.together():
        for line in _lines(config, latents, accelerator, processes):
            if processes.is_main:
                print(line, flush=True)
    accelerator.end_training()


def _lines(
    config: Config, latents: LatentStore | None, accelerator: Accelerator, processes: Processes
) -> Iterator[str]:
    folder, micro = Path(config.output_dir), micro_batch_size(config, processes.world)
    sizes: dict[str, Any] = {"seed": config.seed, "batch_size": config.train.batch_size}
    on_main(processes, lambda: files.prepare_folder(folder, overwrite=False, resume=True))
    if shared(processes, lambda: files.holds_run(folder)):
        folder /= files.PLAN  # the run's own lists and pictures stay as they are
        on_main(processes, lambda: make_writable(folder, f"output_dir {config.output_dir!r}"))
    found: list[str] = []
    source, held_out = open_data(
        config.data, folder=folder, processes=processes, say=found.append, **sizes
    )
    yield from found
    origin = find_origin(config, processes)
    config = as_started(config, origin)
    trainer = Trainer(built_for(config, None, origin), accelerator, processes)
    stage = trainer.first_stage.network
    for problem in factor_problems(config, stage.downsample_factor):
        raise ConfigError(problem)
    held = len(held_out) if held_out is not None else 0
    yield introduction(trainer, micro=micro, samples=len(source), held_out=held)
    course = phases(config, stage.bottleneck)
    positions = _positions(config, course, micro, processes)
    given = pair_latents(latents, source, config.data, stage)
    stream = open_stream(
        source, config.data, given,
        channels=stage.in_channels, late_start=config.late_start, **sizes,
    )  # fmt: skip
    pin = accelerator.device.type == "cuda"
    with contextlib.closing(
        start_loader(open_loader(stream, positions, workers=config.data.workers, pin_memory=pin))
    ) as batches:
        picture = folder / files.FIRST_BATCH
        first = _step(batches, positions.micro_batches, accelerator)
        if processes.is_main:
            draw_first_batch(first[0].pixels, picture)
        timings = _time(trainer, course, batches, positions.micro_batches, first)
    yield from _costs(config, course, timings)
    yield f"memory    {_memory(accelerator)}"
    yield f"picture   {picture}: the first crops, as the network gets them"


def _positions(
    config: Config, course: list[Phase], micro: int, processes: Processes
) -> StepSampler:
    """The positions to time: the first ones, but where crops are larger, those of such steps."""
    late = config.train.max_steps if config.late_start is None else config.late_start
    each = range(_TIMED_STEPS + 1)
    early = itertools.cycle(range(late))
    steps = [
        next(early) if phase.start < late else phase.start + number
        for phase in course
        for number in each
    ]
    return StepSampler(config.train.batch_size, micro, steps, processes.rank, processes.world)


def _step(batches: Iterator[Batch], count: int, accelerator: Accelerator) -> list[Batch]:
    return [next(batches).to(accelerator.device) for _ in range(count)]


def _time(
    trainer: Trainer, course: list[Phase], batches: Iterator[Batch], count: int, first: list[Batch]
) -> Timings:
    """Time a few steps of each phase; the first of each warms up, and is not counted."""
    found, waited, began = Timings(), 0.0, time.perf_counter()
    micro_batches = first
    for phase in course:
        seconds: list[float] = []
        while len(seconds) <= _TIMED_STEPS:
            start = time.perf_counter()
            if not micro_batches:
                micro_batches = _step(batches, count, trainer.accelerator)
                waited += time.perf_counter() - start
            for batch in micro_batches:
                found.broken |= batch.broken
                found.looked_at |= {*batch.ids, *batch.broken}
            trainer.training_step(min(phase.start + 1, phase.end - 1), micro_batches)
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            micro_batches = []
            seconds.append(time.perf_counter() - start)
            if max(trainer.processes.gather(seconds[-1])) > _PATIENCE:
                for _ in range(_TIMED_STEPS + 1 - len(seconds)):  # the next phase has its own
                    _step(batches, count, trainer.accelerator)
                break
        found.seconds.append(statistics.median(seconds[1:] or seconds))
    found.waited = waited / (time.perf_counter() - began)
    return found


def _costs(config: Config, course: list[Phase], timings: Timings) -> Iterator[str]:
    total = 0.0
    for phase, seconds in zip(course, timings.seconds, strict=True):
        steps = phase.end - phase.start
        total += steps * seconds
        yield (
            f"time      {duration(steps * seconds):>10} for {steps:,} step{'s' * (steps > 1)} of "
            f"{seconds:.3g} s from step {phase.start:,} on: {phase.begins}"
        )
    rate = config.train.max_steps * config.train.batch_size / total
    yield (
        f"in all    {duration(total):>10} here, {rate:,.1f} images/s, without validations and the "
        f"export; waiting for data {timings.waited:.0%}"
    )
    if timings.broken:
        name, reason = next(iter(timings.broken.items()))
        yield (
            f"left out  {len(timings.broken)} of {len(timings.looked_at)} images that were looked "
            f"at cannot be decoded, such as {name}: {reason}"
        )


def _memory(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        _, whole = torch.cuda.mem_get_info()
        most = torch.cuda.max_memory_reserved()
        return f"{most / 2**30:.1f} of the GPU's {whole / 2**30:.1f} GiB at most"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{most / 2**20:,.0f} MiB at most, for each process"


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3 h 20 min`, `2 days 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"
