"""Batches of one shape, the same number on every process."""

from collections.abc import Iterator

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from first_stage.seeding import Purpose, generator
from latent_tools.read.dataset import LatentDataset


class BucketBatchSampler(Sampler[list[int]]):
    """Batches whose samples share a shape, divided over processes.

    At every step all processes get a batch of the same bucket, and all have the same number of
    steps. The order is a function of (seed, epoch). Give it to a `DataLoader` as `batch_sampler`;
    do not let accelerate's `prepare` divide that loader a second time.

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
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if is_distributed else 0
        if world is None:
            world = torch.distributed.get_world_size() if is_distributed else 1
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        shapes = dataset.shapes
        self._buckets = [
            np.flatnonzero((shapes == shape).all(1)) for shape in np.unique(shapes, axis=0)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, and let the data set draw anew."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        whole = self.batch_size * self.world
        if self.drop_last:
            return sum(len(rows) // whole for rows in self._buckets)
        return sum(-(-len(rows) // whole) for rows in self._buckets)

    def __iter__(self) -> Iterator[list[int]]:
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
