"""Batches of one shape, the same number on every process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from first_stage.seeding import Purpose, generator
from latent_tools.format.files import CacheError
from latent_tools.read.dataset import LatentDataset
from latent_tools.read.epoch import (
    check_states,
    loader_of_accelerate,
    processes,
    reads_for_all,
)


class BucketBatchSampler(Sampler[list[int]]):
    """Batches whose samples share a shape, divided over processes.

    At every step all processes get a batch of the same bucket, and all have the same number of
    steps. The order is a function of (seed, epoch). Give it to a `DataLoader` as `batch_sampler`.
    Do not let accelerate's `prepare` divide that loader a second time, which is refused; with
    `rank=0, world=1` it may divide it, and processes then get batches of different buckets.

    Args:
        dataset: The cache.
        batch_size: Samples per batch of one process.
        shuffle: Shuffle within buckets, and the order of batches.
        seed: Seed of the order.
        rank: This process; `None` asks `torch.distributed`.
        world: Number of processes; `None` asks `torch.distributed`.
        drop_last: Leave out what does not fill a batch on every process, per bucket. Otherwise the
            last batches of a bucket are smaller, as even as possible; when there are fewer samples
            left than processes, some of that bucket come twice, since every process needs one.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
    ):
        if rank is None:
            rank = torch.distributed.get_rank() if processes() > 1 else 0
        if world is None:
            world = processes()
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        shapes = sorted({(int(h), int(w)) for h, w in dataset.unit_table.shapes})
        self._buckets = [dataset.of_shape(shape) for shape in shapes]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, and let the data set draw anew."""
        self.dataset.tell_epoch(epoch, loader_of_accelerate())

    def __len__(self) -> int:
        whole = self.batch_size * self.world
        if self.drop_last:
            return sum(len(rows) // whole for rows in self._buckets)
        return sum(-(-len(rows) // whole) for rows in self._buckets)

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches of the epoch.

        Raises:
            CacheError: When accelerate's `prepare` would divide them a second time, would leave out
                those that are not full, or would join those of different buckets.
        """
        loader = loader_of_accelerate()
        if loader is not None and processes() > 1:
            self._check_prepared(loader)
        return self._batches()

    def _check_prepared(self, loader: Any) -> None:
        check_states(loader)
        advice = "do not prepare this loader (accelerator.device is where batches go)"
        if self.world > 1:
            raise CacheError(
                f"BucketBatchSampler takes the share of process {self.rank} of {self.world}, and "
                "accelerate's prepare divides the loader once more: a part would never be read. "
                f"Give rank=0, world=1, or {advice}"
            )
        if not self.drop_last:
            raise CacheError(
                "BucketBatchSampler with drop_last=False has batches that are not full, which "
                f"accelerate's prepare leaves out: give drop_last=True, or {advice}"
            )
        is_joined = reads_for_all(loader) and not loader.split_batches
        if is_joined and len(self._buckets) > 1:
            raise CacheError(
                "BucketBatchSampler has batches of several shapes, which accelerate joins before "
                f"it sends them (dispatch_batches): set dispatch_batches=False, or {advice}"
            )

    def _batches(self) -> Iterator[list[int]]:
        epoch, whole = self.dataset.epoch, self.batch_size * self.world
        steps: list[np.ndarray] = []
        for number, rows in enumerate(self._buckets):
            if self.shuffle:
                rows = generator(self.seed, Purpose.ORDER, epoch, number).permutation(rows)
            parts = [rows[start : start + whole] for start in range(0, len(rows), whole)]
            if self.drop_last and parts and len(parts[-1]) < whole:
                parts.pop()
            steps += parts
        order = np.arange(len(steps))
        if self.shuffle:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(order)
        for step in order:
            together = np.resize(steps[step], max(len(steps[step]), self.world))
            yield np.array_split(together, self.world)[self.rank].tolist()
