"""A launch: plan what is new, encode what is not committed, finish when everything is.

The first process lists the units that have no commit and hands the list to the others: a directory
that lags behind on one machine cannot make processes divide different lists. A unit is done when
its commit is there. At the end the first process asks for every commit by its name, and writes the
index and the statistics.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from first_stage.data import Reading, Source, deliver
from first_stage.distributed.memory import memory_told
from first_stage.files import patiently
from first_stage.models.first_stage import FirstStage, as_first_stage
from latent_tools.build.checked import is_as_checked, write_look
from latent_tools.build.encode import ChunkEncoder, Pass
from latent_tools.build.encoder import BatchSplitter, LatentEncoder, allow_compiling
from latent_tools.build.finalize import finalize, is_finished, missing_units
from latent_tools.build.images import ChunkReader, DecodedChunk, Preprocessing, chunk_loader
from latent_tools.build.options import CacheOptions
from latent_tools.build.parquet import ParquetStream
from latent_tools.build.prepare import describe_launch, prepare, source_ids
from latent_tools.build.progress import Progress, Watch, example_failure, timed
from latent_tools.build.stopped import forget_stop, write_stop
from latent_tools.build.unit import EncodedChunk
from latent_tools.build.writer import UnitWriter
from latent_tools.format.files import CacheError, LaunchLock
from latent_tools.format.manifest import FILE as MANIFEST
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import FILE as PLAN
from latent_tools.format.plan import Plan, Unit, committed_of, committed_units

_LAG = 60.0
"""Seconds after which a network's file system shows what another machine wrote."""
_LOOK_AGAIN = 0.2  # seconds


@dataclass(frozen=True)
class Process:
    """One process of a launch.

    Attributes:
        rank: Which, from 0.
        world: Of how many.
        device: Where it encodes.
        barrier: Returns when all processes have called it.
        hand_over: Gives every process the numbers that the first one calls it with.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    barrier: Callable[[], None] = lambda: None
    hand_over: Callable[[list[int]], list[int]] = lambda numbers: numbers


@dataclass
class Outcome:
    """What one process did.

    Attributes:
        images: Samples it encoded.
        units: Units it committed.
        planned: Units of the plan.
        already: Units that were committed before the launch.
        failures: Failed samples: in the whole cache once it is complete, else those of this process
            and of what it saw of others.
        retried: Samples encoded again in float32.
        batch_size: Samples per forward pass at the end; smaller than asked for when memory ran out.
        waits: Seconds spent waiting for data, encoder and disk.
        is_complete: Whether this process saw every unit committed, and finished the cache; the
            first process of a launch does.
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
    accepted: Callable[[], None] = lambda: None,
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
        accepted: Called there once the folder holds the plan of these data.

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
        accepted()
    process.barrier()
    with lock or LaunchLock(folder) as held:
        held.share()
        numbers = []
        if process.rank == 0:
            numbers = [_number_of(ids), _number_written(folder), *_to_do(folder)]
        data, written, *left = process.hand_over(numbers)
        if data != _number_of(ids):
            raise CacheError(
                f"process {process.rank} sees other samples in data.path {source.name!r} than the "
                f"first process ({len(ids)} of them): it must be the same data on all machines. "
                "Start the same command again when it is"
            )
        _await(folder, written)
        plan = Plan.load(folder)
        if (keep := getattr(source, "keep_classes", None)) is not None:
            keep(Manifest.load(folder).source.get("classes") or [])
        work = _Work(folder, plan, left, launch, options, process)
        if left:
            samples = sum(len(unit) for unit in work.left)
            say(f"{samples} samples in {len(left)} of {len(plan.units)} units to encode")
            if options.compile:
                shapes = len({unit.shape for unit in work.left})
                say(f"compiling for each of {shapes} shapes when it first comes: minutes each")
        with memory_told(
            f"while images are cached: lower --data.workers ({options.workers} now) or "
            f"--batch_size ({options.batch_size} now). Complete units are kept: start the same "
            "command to go on"
        ):
            outcome = work.run(source, ids, encoder)
        process.barrier()
        if process.rank == 0:
            work.finish()
        return outcome


def _to_do(folder: Path) -> list[int]:
    """The numbers of the units that have no commit."""
    if is_as_checked(folder):
        return []
    units, listed = Plan.load(folder).units, set(committed_units(folder))
    # What is not listed is asked for by name: a listing may lag behind.
    left = missing_units(folder, [unit for unit in units if unit.number not in listed])
    return [unit.number for unit in left]


def _number_of(ids: pa.Array) -> int:
    """A number that stands for these ids in this order."""
    digest = hashlib.blake2b(digest_size=7)
    if len(ids):
        _, offsets, text = ids.buffers()
        end = int(np.frombuffer(offsets, np.int64)[len(ids)])
        digest.update(memoryview(offsets)[: 8 * (len(ids) + 1)])
        digest.update(memoryview(text)[:end])
    return int.from_bytes(digest.digest(), "big")


def _number_written(folder: Path) -> int:
    """A number that stands for the plan and the manifest that are seen in a folder."""
    digest = hashlib.blake2b(digest_size=7)
    for name in (PLAN, MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            digest.update(patiently((folder / name).read_bytes, repr(str(folder / name))))
    return int.from_bytes(digest.digest(), "big")


def _await(folder: Path, written: int) -> None:
    """Wait until this machine sees the plan and the manifest that the first process wrote."""
    end = time.monotonic() + _LAG
    while _number_written(folder) != written:
        if time.monotonic() > end:
            raise CacheError(
                f"the plan and the manifest in {str(folder)!r} are not here what the first process "
                f"wrote, for {_LAG:.0f} s: output must be one folder for all machines"
            )
        time.sleep(_LOOK_AGAIN)


def _silent(_: str) -> None:
    pass


class _Work:
    """One process's part of a launch."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        left: list[int],
        launch: Manifest,
        options: CacheOptions,
        process: Process,
    ):
        self.folder, self.plan, self.launch = folder, plan, launch
        self.options, self.process = options, process
        self.units = plan.units
        wanted = set(left)
        self.left = [unit for unit in self.units if unit.number in wanted]
        self.own: list[Unit] = []
        self.outcome = Outcome(
            planned=len(self.units),
            already=len(self.units) - len(self.left),
            batch_size=options.batch_size,
        )

    def run(self, source: Source, ids: pa.Array, encoder: LatentEncoder) -> Outcome:
        """Encode this process's units."""
        self.own = _share(self.left, self.process, _reads_in_order(source))
        own = {unit.number for unit in self.own}
        known = {unit.number for unit in self.units} - {unit.number for unit in self.left}
        self.watch = Watch(self.folder, known, own, is_looking=self.process.rank == 0)
        if self.own:
            self._encode(source, ids, encoder)
        self.outcome.failures = self.watch.failures
        return self.outcome

    def finish(self) -> None:
        """Make sure that every unit is committed, and finish the cache.

        Raises:
            CacheError: Naming a unit whose commit is not there.
        """
        patience = _LAG if self.process.world > 1 else 0.0
        units = [] if is_as_checked(self.folder) else self.units
        if missing := missing_units(self.folder, units, patience):
            raise CacheError(
                f"{len(missing)} of {len(self.units)} units of {str(self.folder)!r} have no commit "
                f"(the first is unit {missing[0].number}): the cache is not finished. Start the "
                "same command again; it encodes these and no others"
            )
        if self.left or not is_finished(self.folder, self.plan):
            finalize(self.folder, self.plan)
        write_look(self.folder)
        self.outcome.failures = Manifest.load(self.folder).counts["failures"]
        self._check_failures(self.outcome.failures, [])
        self.outcome.is_complete = True
        forget_stop(self.folder)

    def _encode(self, source: Source, ids: pa.Array, encoder: LatentEncoder) -> None:
        options, device = self.options, self.process.device
        preprocessing = Preprocessing(
            reading=options.reading or Reading(encoder.first_stage.in_channels),
            resolution=options.resolution,
            resize=options.resize,
            has_buckets=self.launch.preprocessing["buckets"] is not None,
            columns=tuple(self.launch.store["columns"]),
        )
        if isinstance(source, ParquetStream):
            source = source.with_columns(preprocessing.columns)
        loader = chunk_loader(
            ChunkReader(source, preprocessing),
            self.plan,
            self.own,
            self.plan.places_in(ids),
            batch_size=options.batch_size,
            workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        if options.compile:
            allow_compiling(len({unit.shape for unit in self.units}), options.batch_size)
        splitter = BatchSplitter(encoder, options.batch_size, is_padded=options.compile)
        chunks_of = ChunkEncoder(
            splitter,
            representation=self.launch.representation,
            dtype=self.launch.store["dtype"],
            flip=options.flip,
            seed=options.seed,
        )
        progress = Progress(self.watch, self.left, is_shown=self.process.rank == 0)
        try:
            self._encode_chunks(timed(deliver(loader), progress), chunks_of, progress)
        finally:
            progress.close()
            self.outcome.waits = progress.waits
            self.outcome.batch_size = splitter.batch_size

    def _encode_chunks(
        self, chunks: Iterator[DecodedChunk], encoder: ChunkEncoder, progress: Progress
    ) -> None:
        # The workers are forked by the first look into the loader, before the writer's thread
        # starts: a fork beside a running thread could inherit a lock that it holds.
        chunks = itertools.chain([next(chunks)], chunks)
        failures: list[tuple[str, str]] = []
        with UnitWriter(
            self.folder, self.launch.store["dtype"], self.launch.tensor_channels,
            self._written,
        ) as writer:  # fmt: skip
            for encoded in _encoded(chunks, encoder, progress):
                self._count(encoded, progress)
                failures = encoded.failures
                if self._are_too_many(self.watch.failures):
                    break
                with progress.waiting("disk"):
                    writer.put(encoded)
        # Leaving the writer committed what waited: only here it is known what is kept.
        self._check_failures(self.watch.failures, failures)

    def _count(self, encoded: EncodedChunk, progress: Progress) -> None:
        samples = len(encoded.records) + len(encoded.failures)
        self.outcome.images += samples
        self.watch.count(len(encoded.failures))
        progress.advance(samples)

    def _written(self, commit: dict[str, Any]) -> None:
        self.outcome.units += 1
        self.outcome.retried += len(commit["retried_in_float32"])

    def _are_too_many(self, failed: int) -> bool:
        return failed > self.options.max_broken * len(self.plan)

    def _check_failures(self, failed: int, latest: list[tuple[str, str]]) -> None:
        if not self._are_too_many(failed):
            return
        name, reason = latest[0] if latest else example_failure(self.folder)
        why = (
            f"{failed} of {len(self.plan)} samples cannot be encoded, more than the share "
            f"data.max_broken {self.options.max_broken} (such as {name}: {reason}): mend them and "
            "add --update, or raise data.max_broken"
        )
        write_stop(self.folder, why)
        there = len(committed_of(self.units, self.folder))
        raise CacheError(
            f"{why}. {there} of {len(self.units)} units are committed"
            f"{' and stay' if there else ': nothing is kept yet'}"
        )


def _reads_in_order(source: Source) -> bool:
    return bool(getattr(source, "reads_in_order", False))


def _share(left: list[Unit], process: Process, in_order: bool) -> list[Unit]:
    """This process's units: every so many-th, or a run where neighbours are cheap to read."""
    if not in_order:
        return left[process.rank :: process.world]
    start, stop = (len(left) * (process.rank + n) // process.world for n in (0, 1))
    return left[start:stop]


def _encoded(
    chunks: Iterator[DecodedChunk], encoder: ChunkEncoder, progress: Progress
) -> Iterator[EncodedChunk]:
    """Chunks through the encoder, each started before the one before it is read back.

    Raises:
        CacheError: What a worker said that could not go on, after what was decoded before.
    """
    started: Pass | None = None
    fault: str | None = None
    for chunk in chunks:
        if (fault := chunk.fault) is not None:
            break
        with progress.waiting("encoder"):
            ahead = encoder.start(chunk)
            encoded = encoder.finish(started) if started is not None else None
        started = ahead
        if encoded is not None:
            yield encoded
    if started is not None:
        with progress.waiting("encoder"):
            encoded = encoder.finish(started)
        yield encoded
    if fault is not None:
        raise CacheError(fault)
