"""Reading a very large cache in the order in which it lies on the disk, roughly."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from first_stage.seeding import Purpose, generator
from latent_tools.format.files import CacheError
from latent_tools.format.plan import Shape
from latent_tools.read.dataset import LatentDataset
from latent_tools.read.epoch import loader_of_accelerate, processes

_TOGETHER = 64
"""Samples that are read at once."""
_BLOCK = 8
"""Neighbours that are read one after the other, which is what a disk likes."""
_WINDOW = 8192
"""Samples that are shuffled with each other: of so many blocks, from anywhere in the mix."""
_PER_OPEN = 64
"""Samples that a reader takes from each shard, on average, where readers share shards."""
_LEAST = 8
"""Shards that a reader mixes, also where it takes fewer samples of each."""


class LatentStream(IterableDataset[dict[str, Any]]):
    """A cache read a few shards at a time, with a state to resume from.

    An epoch goes through the shards in a shuffled order, of which every reader (a process, or each
    of its workers) has a stretch. A reader mixes up to `mix` shards of its stretch with each other:
    disks see short runs, training sees samples from all over the mix, also where each shard holds
    one class. Where a reader would have few shards to itself, several share a longer stretch: each
    opens all of its shards, as long as it takes 64 samples of each, or 8 shards. The order is a
    function of (seed, epoch, number of readers).

    Processes get equally many samples, so that all of them make equally many steps.

    `state_dict` and `load_state_dict` resume within an epoch; a state that is taken at its end
    begins the next one. A `DataLoader` with workers reads in copies of the stream; use torchdata's
    `StatefulDataLoader` there, which asks each copy.

    With several processes give `rank` and `world`, and do not let accelerate's `prepare` divide the
    loader a second time, which is refused. Without them it may: its first process then reads for
    all.

    Args:
        dataset: The cache as items; its `set_epoch` is called here.
        mix: Shards that are mixed with each other.
        shuffle: Shuffle shards and samples; otherwise in the order of the plan.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        shape: (height, width) of the bucket to read; needed when there are several.
        drop_last: Leave out the samples, fewer than `world`, that would make shares uneven; other
            ones in each epoch. Otherwise some come twice.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        mix: int = 128,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shape: Shape | None = None,
        drop_last: bool = True,
    ):
        self.dataset, self.mix, self.shuffle, self.seed = dataset, max(1, mix), shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        table, chosen = dataset.unit_table, dataset.units_of_shape(shape)
        chosen = chosen[np.diff(table.starts)[chosen] > 0]  # of some units every sample failed
        self._firsts, self._counts = table.starts[chosen], np.diff(table.starts)[chosen]
        self._place = (dataset.epoch, 0)
        self._readers = 0
        self._resume: tuple[int, int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes. A state of that epoch that was loaded stays.

        Raises:
            CacheError: When accelerate's `prepare` would divide this process's share once more, or
                would keep states that run ahead of training.
        """
        counts = loader_of_accelerate()
        if counts is not None and self.world > 1 and processes() > 1:
            raise CacheError(
                f"LatentStream takes the share of process {self.rank} of {self.world}, and "
                "accelerate's prepare divides the loader once more: a part would never be read. "
                "Leave rank and world out, or do not prepare this loader (accelerator.device is "
                "where batches go)"
            )
        self.dataset.tell_epoch(epoch, counts)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: the epoch, how many of its samples this reader gave, in which order."""
        epoch, taken = self._place
        return {"epoch": epoch, "taken": taken, "readers": self._readers, "order": self._order()}

    def _order(self) -> list[int]:
        """What the order of an epoch depends on beside the number of readers."""
        samples = int(self._counts.sum())
        return [samples, len(self._counts), self.seed, self.mix, self.shuffle, self.drop_last]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same number of processes and workers.

        The epoch is that of the state, unless the training loop sets another one.

        Raises:
            CacheError: When the state is of within an epoch of another order: of other options, or
                of a cache that has grown since.
        """
        worker, workers = _this_worker()
        epoch, taken, readers = state["epoch"], state["taken"], state.get("readers", 0)
        there = self._order()
        if taken and (then := state.get("order", there)) != there:
            names = ("samples", "shards", "seed", "mix", "shuffle", "drop_last")
            changed = ", ".join(
                f"{name} was {a:d} and is {b:d}"
                for name, a, b in zip(names, then, there, strict=True)
                if a != b
            )
            raise CacheError(
                f"the stream's state is of an epoch in another order ({changed}): use the same "
                "options and the cache as it was, or begin an epoch"
            )
        is_over = taken > 0 and taken >= self._share(worker, workers)[1]
        self.dataset.restore_epoch(epoch + is_over, worker)
        self._place = (epoch, taken)
        # Other workers may have something left of an epoch that is over for this one.
        is_next = is_over and get_worker_info() is None and not self.dataset.is_epoch_told
        self._resume = None if is_next else (epoch, taken, readers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This reader's items: from the beginning, or once from where a loaded state was taken.

        Raises:
            CacheError: When the state is of another number of readers, or the epoch is set after a
                worker has begun.
        """
        worker, workers = _this_worker()
        self._readers = self.world * workers
        epoch, taken = self.dataset.epoch, 0
        if self._resume is not None:
            of, place, readers = self._resume
            if of == epoch or not self.dataset.is_epoch_told:
                epoch, taken = of, place
            self._resume = None
            if taken and readers and readers != self._readers:
                raise CacheError(
                    f"the stream's state was taken with {readers} readers (processes times "
                    f"workers), now there are {self._readers}: use as many, or begin an epoch"
                )
        self._place = (epoch, taken)
        return self._read(epoch, taken, worker, workers)

    def _read(self, epoch: int, taken: int, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        name = "tokens" if self.dataset.manifest.holds_tokens else "latents"
        if not taken:  # accelerate asks for an iterator long before it reads
            epoch = self.dataset.epoch
        for rows in self._rows(epoch, taken, worker, workers):
            self.dataset.check_worker()
            for item in self.dataset.items(rows, epoch):
                taken += 1
                self._place = (epoch, taken)
                # Not a view: whoever keeps an item, or sends it on, means this one alone.
                yield {**item, name: item[name].clone()}

    def _share(self, worker: int, workers: int) -> tuple[int, int]:
        """Where a reader's stretch of the epoch begins, and how many samples it has."""
        samples = int(self._counts.sum())
        whole = samples // self.world if self.drop_last else -(-samples // self.world)
        reader = self.rank * workers + worker
        begin, end = (
            n // workers * whole + whole * (n % workers) // workers for n in (reader, reader + 1)
        )
        return begin, end - begin

    def _rows(self, epoch: int, taken: int, worker: int, workers: int) -> Iterator[list[int]]:
        """Places in the cache of this reader's samples, a few at a time."""
        readers, reader = self.world * workers, self.rank * workers + worker
        # Readers of one team mix the same stretch of shards, of whose blocks each has its own.
        teams = self._teams(readers)
        team = reader * teams // readers
        first, last = (-(-(team + n) * readers // teams) for n in (0, 1))
        begin, end = (
            self._share(n - self.rank * workers, workers)[0] for n in (first, last)
        )  # of the team
        start, left = self._share(worker, workers)
        low, high = start - begin, start - begin + left
        for parts, counters in self._groups(epoch, begin, end):
            size = sum(stop - start for start, stop in parts)
            if low < size and high > 0:
                for rows in self._windows(parts, max(0, low), min(high, size), counters):
                    own = rows[taken:]
                    taken = max(0, taken - len(rows))
                    for at in range(0, len(own), _TOGETHER):
                        yield own[at : at + _TOGETHER].tolist()
            low, high = low - size, high - size

    def _teams(self, readers: int) -> int:
        """Into how many stretches the shards are cut."""
        shards = len(self._counts)
        each = max(_LEAST, int(self._counts.sum()) / readers / _PER_OPEN)
        return max(1, min(readers, max(int(shards / each), -(-shards // self.mix))))

    def _groups(
        self, epoch: int, begin: int, end: int
    ) -> Iterator[tuple[list[tuple[int, int]], tuple[int, ...]]]:
        """Runs of rows of a stretch of the epoch, `mix` shards at a time; and keys of draws."""
        order = np.arange(len(self._counts))
        if self.shuffle:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(order)
        ends = np.cumsum(self._counts[order])
        samples = int(ends[-1]) if len(ends) else 0
        stretches = [(begin, min(end, samples))]
        if end > samples:  # shares are filled up with the first ones
            stretches.append((max(0, begin - samples), end - samples))
        for number, (low, high) in enumerate(stretches):
            if low >= high:
                continue
            begins = ends - self._counts[order]
            inside = np.flatnonzero((ends > low) & (begins < high))
            starts, stops = np.maximum(low, begins[inside]), np.minimum(high, ends[inside])
            # Groups of equal size: a last one of few shards would hardly be mixed. A shard that is
            # cut at an end of the stretch counts for what is left of it.
            worth = float(((stops - starts) / self._counts[order[inside]]).sum())
            shift = self._firsts[order[inside]] - begins[inside]
            runs = np.stack([starts + shift, stops + shift], axis=1)
            groups = np.array_split(runs, math.ceil(worth / self.mix - 1e-9))
            for group, parts in enumerate(groups):
                yield [(int(a), int(b)) for a, b in parts], (epoch, low, number, group)

    def _windows(
        self, parts: list[tuple[int, int]], low: int, high: int, counters: tuple[int, ...]
    ) -> Iterator[np.ndarray]:
        """The rows from `low` to `high` of runs in shuffled blocks, shuffled some blocks at a time.

        Whose rows they are is decided by blocks, so that neighbours are read by one reader.
        """
        if self.shuffle:
            starts = np.concatenate([np.arange(first, last, _BLOCK) for first, last in parts])
            stops = np.concatenate(
                [np.minimum(np.arange(first, last, _BLOCK) + _BLOCK, last) for first, last in parts]
            )
            blocks = generator(self.seed, Purpose.ORDER, *counters).permutation(len(starts))
            starts, stops = starts[blocks], stops[blocks]
        else:
            starts, stops = np.array(parts).T
        ends = np.cumsum(stops - starts)
        begins = ends - (stops - starts)
        chosen = np.flatnonzero((ends > low) & (begins < high))
        stops = np.minimum(stops, starts + high - begins)[chosen]
        starts = np.maximum(starts, starts + low - begins)[chosen]
        if not self.shuffle:
            yield from (np.arange(a, b) for a, b in zip(starts, stops, strict=True))
            return
        draw = generator(self.seed, Purpose.ORDER, *counters, low)
        windows = -(-(high - low) // _WINDOW)
        for together in np.array_split(np.stack([starts, stops], axis=1), windows):
            yield draw.permutation(np.concatenate([np.arange(a, b) for a, b in together]))


def _this_worker() -> tuple[int, int]:
    """The data loader's worker that this is, and of how many; (0, 1) in the main process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
