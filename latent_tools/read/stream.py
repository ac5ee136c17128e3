"""Reading a very large cache in the order in which it lies on the disk, roughly."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from first_stage.seeding import Purpose, generator
from latent_tools.format.files import CacheError
from latent_tools.format.plan import Shape
from latent_tools.read.dataset import LatentDataset
from latent_tools.read.epoch import is_asked_by_accelerate, processes

_TOGETHER = 64
"""Samples that are read at once."""
_BLOCK = 8
"""Neighbours that are read one after the other, which is what a disk likes."""
_WINDOW = 8192
"""Samples that are shuffled with each other: of so many blocks, from anywhere in the mix."""
_SHARED = 8
"""Readers that would have fewer shards than this to themselves share some."""


class LatentStream(IterableDataset[dict[str, Any]]):
    """A cache read a few shards at a time, with a state to resume from.

    An epoch goes through the shards in a shuffled order, of which every reader (a process, or each
    of its workers) has a stretch. A reader mixes `mix` shards of its stretch with each other: disks
    see short runs, training sees samples from all over the mix, also where each shard holds one
    class. The order is a function of (seed, epoch, number of readers).

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
        self._firsts, self._counts = table.starts[chosen], np.diff(table.starts)[chosen]
        self._place = (dataset.epoch, 0)
        self._readers = 0
        self._resume: tuple[int, int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes. A state of that epoch that was loaded stays.

        Raises:
            CacheError: When accelerate's `prepare` would divide this process's share once more.
        """
        is_count = is_asked_by_accelerate()
        if is_count and self.world > 1 and processes() > 1:
            raise CacheError(
                f"LatentStream takes the share of process {self.rank} of {self.world}, and "
                "accelerate's prepare divides the loader once more: a part would never be read. "
                "Leave rank and world out, or do not prepare this loader (accelerator.device is "
                "where batches go)"
            )
        self.dataset.tell_epoch(epoch, is_count)

    def state_dict(self) -> dict[str, int]:
        """Where to go on: the epoch, how many of its samples this reader gave, of how many."""
        epoch, taken = self._place
        return {"epoch": epoch, "taken": taken, "readers": self._readers}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with the same number of processes and workers.

        The epoch is that of the state, unless the training loop sets another one.
        """
        worker, workers = _this_worker()
        epoch, taken, readers = state["epoch"], state["taken"], state.get("readers", 0)
        is_over = taken > 0 and taken >= self._share(worker, workers)[1]
        self.dataset.restore_epoch(epoch + is_over, worker)
        self._place = (epoch, taken)
        # Other workers may have something left of an epoch that is over for this one.
        is_next = is_over and get_worker_info() is None and not self.dataset.is_epoch_told
        self._resume = None if is_next else (epoch, taken, readers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This reader's items: from the beginning, or once from where a loaded state was taken.

        Raises:
            CacheError: When the state is of another number of readers.
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
        for rows in self._rows(epoch, taken, worker, workers):
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
        # Readers of one team mix the same stretch of shards and take turns in it.
        teams = max(1, min(readers, len(self._counts) // min(self.mix, _SHARED)))
        team = reader * teams // readers
        first, last = (-(-(team + n) * readers // teams) for n in (0, 1))
        begin, end = (
            self._share(n - self.rank * workers, workers)[0] for n in (first, last)
        )  # of the team
        start, left = self._share(worker, workers)
        skip, left = start + taken - begin, left - taken
        for rows in self._mixed(epoch, begin, end):
            own = rows[skip : skip + left]
            skip, left = max(0, skip - len(rows)), left - len(own)
            for at in range(0, len(own), _TOGETHER):
                yield own[at : at + _TOGETHER].tolist()
            if not left:
                return

    def _mixed(self, epoch: int, begin: int, end: int) -> Iterator[np.ndarray]:
        """A stretch of the epoch's shards, mixed; in windows."""
        order = np.arange(len(self._counts))
        if self.shuffle:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(order)
        ends = np.cumsum(self._counts[order])
        samples = int(ends[-1]) if len(ends) else 0
        stretches = [(begin, min(end, samples))]
        if end > samples:  # shares are filled up with the first ones
            stretches.append((max(0, begin - samples), end - samples))
        for number, (low, high) in enumerate(stretches):
            if low < high:
                inside = np.flatnonzero((ends > low) & (ends - self._counts[order] < high))
                for group in range(0, len(inside), self.mix):
                    parts = []
                    for shard in inside[group : group + self.mix]:
                        unit, stop = order[shard], ends[shard]
                        begins = stop - self._counts[unit]
                        rows = np.array([max(low, begins), min(high, stop)]) - begins
                        parts.append(tuple((self._firsts[unit] + rows).tolist()))
                    yield from self._windows(parts, (epoch, low, number, group))

    def _windows(
        self, parts: list[tuple[int, int]], counters: tuple[int, ...]
    ) -> Iterator[np.ndarray]:
        """Runs of rows in blocks, the blocks shuffled, and then the samples of some blocks."""
        if not self.shuffle:
            for first, last in parts:
                yield np.arange(first, last)
            return
        starts = np.concatenate([np.arange(first, last, _BLOCK) for first, last in parts])
        stops = np.concatenate(
            [np.minimum(np.arange(first, last, _BLOCK) + _BLOCK, last) for first, last in parts]
        )
        draw = generator(self.seed, Purpose.ORDER, *counters)
        blocks = draw.permutation(len(starts))
        together = _WINDOW // _BLOCK
        for begin in range(0, len(blocks), together):
            chosen = blocks[begin : begin + together]
            rows = [np.arange(starts[block], stops[block]) for block in chosen]
            yield draw.permutation(np.concatenate(rows))


def _this_worker() -> tuple[int, int]:
    """The data loader's worker that this is, and of how many; (0, 1) in the main process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
