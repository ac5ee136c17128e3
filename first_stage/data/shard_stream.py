"""Training on shards as a stream: no copy on disk, and the same guarantees as for files on disk.

Row counts are known beforehand, so the order can be what it is elsewhere: a pure function of seed
and position. Position n of the stream is of epoch `n // N`, and the N positions of an epoch visit
each of the N samples exactly once. There is no state to save, so a resumed run repeats and drops
nothing, and neither processes nor workers change what a step sees.

What differs from a data set on disk is how an epoch is shuffled, so that files are read in order:

1. The shards are permuted, and their rows laid end to end.
2. That row of samples is cut into `batch_size` stretches of equal length (to one sample). Place j
   of every batch reads stretch j from front to back, so a batch mixes samples from all over.
3. A stretch is read in windows of `buffer / batch_size` samples, and each window is permuted.
   The windows of the stretches begin at different steps, so that no step waits for all of them.

A process reads the stretches of its own places of the batch, a worker its share of them: none
reads what another one does. A sample that cannot be decoded is replaced by the next one of its
stretch.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from first_stage.data.decode import Reading
from first_stage.data.images import View
from first_stage.data.sample import Sample
from first_stage.data.shards import RowSource, ShardedRows
from first_stage.data.stream import Batch, Later, TrainingStream, collate
from first_stage.data.variation import Variation
from first_stage.data.workers import prepare_worker
from first_stage.errors import DataError
from first_stage.seeding import Purpose, generator


class StreamSource(RowSource):
    """Some of the rows of shards: all but every q-th one, or every q-th one.

    Args:
        rows: All rows.
        held_out_every: Every so many-th row is held out; 0 holds none out. At least 2 otherwise.
        held_out: Whether this is the held-out part.
    """

    def __init__(self, rows: ShardedRows, held_out_every: int = 0, held_out: bool = False):
        super().__init__(rows)
        self.every, self.held_out = held_out_every, held_out

    def __len__(self) -> int:
        return self._before(len(self.rows))

    def _before(self, row: int) -> int:
        """How many samples of this part come before a row."""
        held = row // self.every if self.every else 0
        return held if self.held_out else row - held

    def row(self, index: int) -> int:
        """The row of a sample."""
        if not self.every:
            return index
        if self.held_out:
            return index * self.every + self.every - 1
        return index + index // (self.every - 1)

    def shard_starts(self) -> np.ndarray:
        """The first sample of each shard, and the number of all samples: `(shards + 1,)`."""
        return np.array([self._before(int(start)) for start in self.rows.starts])

    def read_range(self, first: int, last: int, cursor: int) -> list[Sample]:
        """Samples that follow each other in one shard; see `ShardedRows.read`."""
        if first == last:
            return []
        begin, end = self.row(first), self.row(last - 1) + 1
        wanted = {self.row(index) for index in range(first, last)}
        found = self.rows.read(begin, end, cursor)
        return [sample for row, sample in enumerate(found, begin) if row in wanted]

    def fingerprint(self) -> str:
        """A hash of the shards' names, sizes and counts, and of which rows these are."""
        return hashlib.sha256(
            f"{self.every} {self.held_out} {super().fingerprint()}".encode()
        ).hexdigest()[:16]

    def earlier_fingerprint(self) -> str:
        """As checkpoints of version 0.1 hold it."""
        digest = hashlib.sha256(f"{self.every} {self.held_out}\n".encode())
        for shard in self.rows.shards:
            digest.update(f"{shard.name} {shard.size} {shard.rows}\n".encode())
        return digest.hexdigest()[:16]


def split_stream(rows: ShardedRows, share: float) -> tuple[StreamSource, StreamSource | None]:
    """Hold rows out, spread evenly over the shards.

    Args:
        rows: All rows.
        share: The share to hold out, in [0, 0.5]; at least one row when it is above 0.

    Raises:
        DataError: When the share is too large, or leaves nothing to train on.
    """
    if share == 0:
        return StreamSource(rows), None
    if share > 0.5:
        raise DataError(
            f"data.validation_share is {share}; with data.streaming at most 0.5 can be held out"
        )
    every = min(round(1 / share), len(rows))
    if every < 2:
        raise DataError(
            f"data.validation_share {share} of the {len(rows)} samples of {rows.name!r} leaves "
            "nothing to train on: lower it, or give data.validation_path"
        )
    return StreamSource(rows, every), StreamSource(rows, every, held_out=True)


class StreamOrder:
    """Which sample is at which position; see the top of this module.

    Args:
        starts: First sample of each shard, and the number of all: `(shards + 1,)`.
        seed: The run's seed.
        slots: Places in a batch: the global batch size.
        buffer: Samples that are shuffled together, over all places.
    """

    def __init__(self, starts: Sequence[int] | np.ndarray, seed: int, slots: int, buffer: int):
        self.starts, self.seed, self.slots = np.asarray(starts), seed, slots
        self.total = int(self.starts[-1])
        self.window = max(buffer // slots, 1)
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def find(self, position: int) -> tuple[int, int]:
        """Epoch and sample at a position."""
        epoch, samples, place = self._window(position)
        return epoch, int(samples[place])

    def window_at(self, position: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """The window that a position draws from.

        Returns:
            A name for it, equal for all positions of the window, and the ranges of samples in it in
            the order in which they lie in their shards: first, and the one to end before.
        """
        epoch, first, last, _ = self._bounds(position)
        order, ends = self._epoch(epoch)
        ranges = []
        while first < last:
            at = int(np.searchsorted(ends, first, side="right"))
            stop = min(last, int(ends[at]))
            shard = int(order[at])
            base = int(self.starts[shard + 1]) - int(ends[at])
            ranges.append((base + first, base + stop))
            first = stop
        return (epoch, self._bounds(position)[1]), ranges

    def _window(self, position: int) -> tuple[int, np.ndarray, int]:
        """Epoch, the window's samples in their shuffled order, and which of them it is."""
        epoch, first, last, place = self._bounds(position)
        _, ranges = self.window_at(position)
        samples = np.concatenate([np.arange(*each) for each in ranges])
        drawn = generator(self.seed, Purpose.ORDER, epoch, 1, first).permutation(last - first)
        return epoch, samples[drawn], place

    def _bounds(self, position: int) -> tuple[int, int, int, int]:
        """Epoch, the window's first place in the epoch's row, its end, and the place in it."""
        epoch, place = divmod(position, self.total)
        along, stretch = divmod(place, self.slots)
        length, longer = divmod(self.total, self.slots)
        start = stretch * length + min(stretch, longer)
        end = start + length + (stretch < longer)
        # Each stretch's first window is shorter by another phase, so that windows are read one
        # after the other instead of all in one step.
        phase = self.window * stretch // self.slots
        border = start - phase + (along + phase) // self.window * self.window
        first = max(border, start)
        return epoch, first, min(border + self.window, end), start + along - first

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch's shards, and where each one's samples end in the row."""
        if epoch not in self._shards:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.starts) - 1)
            ends = np.cumsum(np.diff(self.starts)[order])
            # Windows of two epochs are open at the same time around an epoch's end.
            kept = {e: v for e, v in self._shards.items() if e == epoch - 1}
            self._shards = kept | {epoch: (order, ends)}
        return self._shards[epoch]


class ShardStream(TrainingStream):
    """The endless stream of samples of shards, indexed by position.

    Any position can be asked for; reading is cheap where every slot's positions come in order.

    Args:
        source: The samples.
        view: Resize and crop.
        reading: How files are read, or just into how many channels.
        seed: The run's seed.
        slots: The global batch size.
        buffer: Samples that are held, still encoded, and shuffled together, over all processes.
        variation: What differs from epoch to epoch.
        later: From where on the view is another one.
    """

    def __init__(
        self,
        source: StreamSource,
        view: View,
        reading: Reading | int,
        seed: int,
        slots: int,
        buffer: int,
        variation: Variation = Variation(),  # noqa: B008, it is frozen
        later: Later | None = None,
    ):
        super().__init__(source, view, reading, seed, variation, later=later)
        self.shards = source
        self.order = StreamOrder(source.shard_starts(), seed, slots, buffer)
        self._held: dict[int, tuple[tuple[int, int], dict[int, Sample]]] = {}

    def sample_at(self, position: int) -> tuple[int, int]:
        """Epoch and sample at a position of the stream."""
        return self.order.find(position)

    def replacement(self, position: int, ahead: int) -> int:
        """The position whose sample takes the place of one that cannot be decoded."""
        return position + ahead * self.order.slots

    def read(self, position: int, index: int) -> Sample:
        """The sample, from the window that its slot holds."""
        slot = position % self.order.slots
        name, ranges = self.order.window_at(position)
        if slot not in self._held or self._held[slot][0] != name:
            self._held.pop(slot, None)  # before the next one is read
            samples: dict[int, Sample] = {}
            for first, last in ranges:
                found = self.shards.read_range(first, last, slot)
                samples |= dict(zip(range(first, last), found, strict=True))
            self._held[slot] = (name, samples)
        return self._held[slot][1][index]


class _Parts(IterableDataset[Batch | None]):
    """A worker's part of each group of positions: always the same places, so the same slots."""

    def __init__(self, stream: ShardStream, groups: Iterable[list[int]]):
        self.stream, self.groups = stream, groups

    def __iter__(self) -> Iterator[Batch | None]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for group in self.groups:
            mine = group[len(group) * number // count : len(group) * (number + 1) // count]
            yield collate([self.stream[position] for position in mine]) if mine else None


def _grouped(batches: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """So many lists joined into one."""
    group: list[list[int]] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield [position for part in group for position in part]
            group = []


class _Groups:
    """`_grouped`, as something that can be iterated again in a worker."""

    def __init__(self, batches: Iterable[list[int]], size: int):
        self.batches, self.size = batches, size

    def __iter__(self) -> Iterator[list[int]]:
        return _grouped(self.batches, self.size)


def _as_it_is(part: Batch | None) -> Batch | None:
    return part


class ShardLoader:
    """Decodes a process's micro-batches in workers, ahead of the step.

    Args:
        stream: The stream.
        batches: Lists of positions, one per micro-batch.
        per_step: Micro-batches in a step; workers share a step's positions.
        workers: Worker processes; 0 decodes in this one.
        pin_memory: Copy batches to page-locked memory, for a GPU.
    """

    def __init__(
        self,
        stream: ShardStream,
        batches: Iterable[list[int]],
        per_step: int,
        workers: int,
        pin_memory: bool,
    ):
        self.per_step, self.pin_memory = per_step, pin_memory
        self.parts = max(workers, 1)
        self._loader: DataLoader[Any] = DataLoader(
            _Parts(stream, _Groups(batches, per_step)),
            batch_size=None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=prepare_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        # Started here and not with the first batch, so that `start_loader` sees it.
        return self._deliver(iter(self._loader))

    def _deliver(self, parts: Iterator[Batch | None]) -> Iterator[Batch]:
        while True:
            # The workers take turns, so that many parts in a row make up a step.
            group = [part for _, part in zip(range(self.parts), parts, strict=False)]
            if not group:
                return
            for batch in _split(_joined([p for p in group if p is not None]), self.per_step):
                yield batch.pin_memory() if self.pin_memory else batch


def _joined(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return Batch(
        torch.cat([part.pixels for part in parts]),
        [position for part in parts for position in part.positions],
        [name for part in parts for name in part.ids],
        {name: reason for part in parts for name, reason in part.broken.items()},
    )


def _split(batch: Batch, count: int) -> Iterator[Batch]:
    size = len(batch.ids) // count
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        broken = batch.broken if start == 0 else {}
        yield Batch(batch.pixels[part], batch.positions[part], batch.ids[part], broken)
