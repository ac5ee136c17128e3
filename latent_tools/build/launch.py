"""A launch: plan what is new, encode what is not committed, finish when everything is.

Every process does the same: it takes its share of the units that have no commit and encodes them
one after the other. There is no barrier at the end: a unit is done when its commit is there, and
whichever process commits the last one writes the index and the statistics.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from first_stage.data import Reading, Source
from first_stage.models.first_stage import FirstStage, as_first_stage
from latent_tools.build.encode import Pass, UnitEncoder
from latent_tools.build.encoder import BatchSplitter, LatentEncoder
from latent_tools.build.finalize import finalize
from latent_tools.build.images import DecodedPortion, PortionReader, Preprocessing, portion_loader
from latent_tools.build.options import CacheOptions
from latent_tools.build.prepare import describe_launch, prepare, source_ids
from latent_tools.build.progress import Progress, Watch, timed
from latent_tools.build.writer import UnitWriter
from latent_tools.format.files import CacheError, LaunchLock
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan, Unit, committed_units


@dataclass(frozen=True)
class Process:
    """One process of a launch.

    Attributes:
        rank: Which, from 0.
        world: Of how many.
        device: Where it encodes.
        barrier: Returns when all processes have called it.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    barrier: Callable[[], None] = lambda: None


@dataclass
class Outcome:
    """What one process did.

    Attributes:
        images: Samples it encoded.
        units: Units it committed.
        planned: Units of the plan.
        already: Units that were committed before the launch.
        failures: Failed samples in the whole cache, as far as this process knows.
        retried: Samples encoded again in float32.
        batch_size: Samples per forward pass at the end; smaller than asked for when memory ran out.
        waits: Seconds spent waiting for data, encoder and disk.
        is_complete: Whether this process saw every unit committed, and finished the cache.
    """

    images: int = 0
    units: int = 0
    planned: int = 0
    already: int = 0
    failures: int = 0
    retried: int = 0
    batch_size: int = 0
    waits: dict[str, float] = field(default_factory=dict)
    is_complete: bool = False


def precompute(
    autoencoder: nn.Module | FirstStage,
    name: str,
    source: Source,
    output: str | Path,
    options: CacheOptions,
    process: Process | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Encode what is not committed yet of a data set.

    Args:
        autoencoder: The first stage, in float32.
        name: Its folder or hub id.
        source: The data set.
        output: The cache's folder; made when it is not there, continued when it is.
        options: How.
        process: This process among those of the launch.
        say: Called with lines for the user, on the first process only.

    Returns:
        What this process did.

    Raises:
        CacheError: When the cache was made with other weights or preprocessing, too many samples
            fail, or an option cannot work.
    """
    process = process or Process()
    say = say if process.rank == 0 else _silent
    folder = Path(output)
    first_stage = as_first_stage(autoencoder, name)
    encoder = LatentEncoder(
        first_stage, process.device, options.precision, options.compile,
        tokens=options.representation == "tokens",
    )  # fmt: skip
    if encoder.is_upcast:
        say("the first stage asks for force_upcast: encoding in float32 instead of fp16")
    launch = describe_launch(source, encoder, options)
    ids = source_ids(source)
    lock = None
    if process.rank == 0:
        lock = prepare(folder, launch, source, ids, options, say)
    process.barrier()
    if (keep := getattr(source, "keep_classes", None)) is not None:
        keep(Manifest.load(folder).source.get("classes") or [])
    with lock or LaunchLock(folder) as held:
        held.share()
        plan = Plan.load(folder)
        done = set(committed_units(folder))
        # Nobody commits before everybody has listed, so all processes divide the same units.
        process.barrier()
        work = _Work(folder, plan, done, launch, options, process)
        if work.left:
            samples = sum(len(unit) for unit in work.left)
            say(f"{samples} samples in {len(work.left)} of {len(plan.units)} units to encode")
        return work.run(source, ids, encoder)


def _silent(_: str) -> None:
    pass


class _Work:
    """One process's part of a launch."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        done: set[int],
        launch: Manifest,
        options: CacheOptions,
        process: Process,
    ):
        self.folder, self.plan, self.launch = folder, plan, launch
        self.options, self.process = options, process
        self.units = plan.units
        self.left = [unit for unit in self.units if unit.number not in done]
        self.own: list[Unit] = self.left[process.rank :: process.world]
        self.watch = Watch(folder, done)
        self.outcome = Outcome(
            planned=len(self.units),
            already=len(self.units) - len(self.left),
            batch_size=options.batch_size,
        )

    def run(self, source: Source, ids: pa.Array, encoder: LatentEncoder) -> Outcome:
        """Encode this process's units; finish the cache when they were the last ones."""
        if self.own:
            self._encode(source, ids, encoder)
        self.outcome.failures = self._check_failures([])
        there = set(committed_units(self.folder))
        if all(unit.number in there for unit in self.units):
            finalize(self.folder)
            self.outcome.is_complete = True
        return self.outcome

    def _encode(self, source: Source, ids: pa.Array, encoder: LatentEncoder) -> None:
        options, device = self.options, self.process.device
        preprocessing = Preprocessing(
            reading=options.reading or Reading(encoder.first_stage.in_channels),
            resolution=options.resolution,
            resize=options.resize,
            has_buckets=self.launch.preprocessing["buckets"] is not None,
            columns=tuple(self.launch.store["columns"]),
        )
        loader = portion_loader(
            PortionReader(source, preprocessing),
            self.plan,
            self.own,
            self.plan.places_in(ids),
            batch_size=options.batch_size,
            workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        splitter = BatchSplitter(encoder, options.batch_size, is_padded=options.compile)
        units = UnitEncoder(
            splitter,
            representation=self.launch.representation,
            dtype=self.launch.store["dtype"],
            flip=options.flip,
            seed=options.seed,
        )
        own = {unit.number for unit in self.own}
        progress = Progress(self.folder, self.left, own, is_shown=self.process.rank == 0)
        try:
            # The workers are forked by the first look into the loader, before the writer's thread
            # starts: a fork beside a running thread could inherit a lock that it holds.
            portions = timed(loader, progress)
            self._encode_portions(portions, units, progress)
        finally:
            progress.close()
            self.outcome.waits = progress.waits
            self.outcome.batch_size = splitter.batch_size

    def _encode_portions(
        self, portions: Iterator[DecodedPortion], units: UnitEncoder, progress: Progress
    ) -> None:
        started: Pass | None = units.start(next(portions))
        with UnitWriter(
            self.folder, self.launch.store["dtype"], self.launch.tensor_channels,
            self._written,
        ) as writer:  # fmt: skip
            while started is not None:
                portion = next(portions, None)
                with progress.waiting("encoder"):
                    ahead = units.start(portion) if portion is not None else None
                    failed, unit = units.finish(started)
                self._count(started.portion, failed, progress)
                if unit is not None:
                    with progress.waiting("disk"):
                        writer.put(unit)
                started = ahead

    def _count(self, portion: DecodedPortion, failed: int, progress: Progress) -> None:
        samples = len(portion.records) + len(portion.failures)
        self.outcome.images += samples
        progress.advance(samples)
        self.watch.add_own(portion.unit, failed)
        if failed:
            self._check_failures(portion.failures)

    def _written(self, commit: dict[str, Any]) -> None:
        self.outcome.units += 1
        self.outcome.retried += len(commit["retried_in_float32"])

    def _check_failures(self, latest: list[tuple[str, str]]) -> int:
        failed, limit = self.watch.failures(), self.options.max_broken * len(self.plan)
        if failed > limit:
            name, reason = latest[0] if latest else self.watch.example()
            raise CacheError(
                f"{failed} of {len(self.plan)} samples cannot be encoded, more than the share "
                f"data.max_broken {self.options.max_broken} (such as {name}: {reason}): mend them, "
                "or raise data.max_broken; what is encoded stays"
            )
        return failed
