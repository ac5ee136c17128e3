"""Reading a very large cache in the order in which it lies on the disk, roughly."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from first_stage.seeding import Purpose, generator
from latent_tools.format.plan import Shape
from latent_tools.read.dataset import LatentDataset

_TOGETHER = 64
"""Samples that are read at once."""


class LatentStream(IterableDataset[dict[str, Any]]):
    """A cache read a few shards at a time, with a state to resume from.

    An epoch goes through the shards in a shuffled order, `mix` of them at a time, and shuffles the
    samples of those: disks see near-sequential reads, training sees samples of `mix` shards mixed.
    The order is a function of (seed, epoch); processes and workers take its samples in turn, so
    each comes exactly once.

    `state_dict` and `load_state_dict` resume within an epoch. A `DataLoader` with workers reads in
    copies of the stream; use torchdata's `StatefulDataLoader` there, which asks each copy.

    Args:
        dataset: The cache as items; its `set_epoch` is called here.
        mix: Shards that are mixed with each other.
        shuffle: Shuffle shards and samples; otherwise in the order of the plan.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        shape: (height, width) of the bucket to read; needed when there are several.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        mix: int = 8,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shape: Shape | None = None,
    ):
        self.dataset, self.mix, self.shuffle, self.seed = dataset, max(1, mix), shuffle, seed
        self.rank, self.world = rank, world
        rows = dataset.of_shape(shape)
        units = dataset.units[rows]
        # The index is sorted by unit: a unit's samples lie side by side.
        self._units = np.split(rows, np.flatnonzero(np.diff(units)) + 1)
        self._taken, self._is_over = 0, False

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch from its beginning."""
        self.dataset.set_epoch(epoch)
        self._taken, self._is_over = 0, False

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many samples this copy of the stream has given in it."""
        return {"epoch": self.dataset.epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with the same number of processes and workers."""
        self.dataset.set_epoch(state["epoch"])
        self._taken, self._is_over = state["taken"], False

    def _order(self) -> Iterator[np.ndarray]:
        epoch = self.dataset.epoch
        order = np.arange(len(self._units))
        if self.shuffle:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(order)
        for start in range(0, len(order), self.mix):
            rows = np.concatenate([self._units[unit] for unit in order[start : start + self.mix]])
            if self.shuffle:
                rows = generator(self.seed, Purpose.ORDER, epoch, start).permutation(rows)
            yield rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._is_over:  # the same epoch once more
            self._taken, self._is_over = 0, False
        worker = get_worker_info()
        workers = worker.num_workers if worker is not None else 1
        readers = self.world * workers
        reader = self.rank * workers + (worker.id if worker is not None else 0)
        position = 0
        first = reader + self._taken * readers
        for rows in self._order():
            here = np.arange(position, position + len(rows))
            position += len(rows)
            own = rows[(here >= first) & (here % readers == reader)].tolist()
            for start in range(0, len(own), _TOGETHER):
                for item in self.dataset.__getitems__(own[start : start + _TOGETHER]):
                    self._taken += 1
                    # Not a view: whoever keeps an item, or sends it on, means this one alone.
                    yield {**item, "latents": item["latents"].clone()}
        # `taken` stays: a state saved here goes on with the next epoch, not with this one again.
        self._is_over = True
