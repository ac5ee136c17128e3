"""Batches for training: an endless stream of samples, each position a pure function of the seed.

Position n of the stream is sample `order(epoch)[n % N]` of epoch `n // N`; step k trains on the
positions k * batch_size ... (k + 1) * batch_size - 1. Each process takes its contiguous slice of a
step's positions, so what a step sees does not depend on the number of processes or workers, and
resuming means starting at a step. No sampler pads or drops: a data set smaller than a batch just
comes round again.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from first_stage.data.pixels import BrokenImage, View, open_image, pixels_of
from first_stage.data.sources import Source
from first_stage.errors import DataError
from first_stage.seeding import Purpose, generator

_LOOK_FURTHER = 100
"""How many unreadable samples in a row are skipped before the data counts as unusable."""


@dataclass
class Batch:
    """One micro-batch of one process.

    Attributes:
        pixels: `(B, H, W, C)` in 0..255, uint8, or float32 when a 16-bit file is among them.
        noise: `(B, *latent_shape)` float32, standard normal; posterior noise.
        ids: The samples' ids.
        broken: Ids and reasons of the samples that could not be decoded and were skipped.
    """

    pixels: Tensor
    noise: Tensor
    ids: list[str]
    broken: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        """Called by the `DataLoader`'s pinning thread."""
        return Batch(self.pixels.pin_memory(), self.noise.pin_memory(), self.ids, self.broken)

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors; asynchronous where the memory is pinned."""
        return Batch(
            self.pixels.to(device, non_blocking=True),
            self.noise.to(device, non_blocking=True),
            self.ids,
            self.broken,
        )


@dataclass(frozen=True)
class Example:
    """One decoded sample: see `Batch` for the fields."""

    pixels: np.ndarray
    noise: np.ndarray
    id: str
    broken: dict[str, str]


class TrainingStream(Dataset[Example]):
    """The endless stream of samples, indexed by position.

    Args:
        source: The samples.
        view: Resize and crop.
        channels: Channels to read files into.
        seed: The run's seed.
        latent_shape: `(C, h, w)` of one sample's posterior noise.
        random_crop: Random crops; centre crops otherwise.
        flip: Mirror half of the views left to right.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        channels: int,
        seed: int,
        latent_shape: tuple[int, int, int],
        random_crop: bool = True,
        flip: bool = True,
    ):
        self.source, self.view, self.channels, self.seed = source, view, channels, seed
        self.latent_shape = latent_shape
        self.random_crop, self.flip = random_crop, flip
        self._order: tuple[int, np.ndarray] | None = None

    def sample_at(self, position: int) -> tuple[int, int]:
        """Epoch and sample index at a position of the stream."""
        epoch, place = divmod(position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            drawn = generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.source))
            self._order = (epoch, drawn)
        return epoch, int(self._order[1][place])

    def __getitem__(self, position: int) -> Example:
        """Decode the sample at a position.

        A sample that cannot be decoded is skipped: the next position's sample takes its place, so
        that batches stay whole and equal for any number of processes.
        """
        broken: dict[str, str] = {}
        for ahead in range(_LOOK_FURTHER):
            epoch, index = self.sample_at(position + ahead)
            try:
                sample_id, pixels = self._decode(epoch, index)
            except BrokenImage as error:
                broken[self.source.id(index)] = str(error)
                continue
            noise = generator(self.seed, Purpose.NOISE, position).standard_normal(
                self.latent_shape, dtype=np.float32
            )
            return Example(pixels, noise, sample_id, broken)
        first, reason = next(iter(broken.items()))
        raise DataError(
            f"{len(broken)} samples in a row of {self.source.name!r} cannot be decoded "
            f"(first: {first}: {reason})"
        )

    def _decode(self, epoch: int, index: int) -> tuple[str, np.ndarray]:
        sample = self.source.read(index)
        image = open_image(sample.image, self.channels)
        draw = generator(self.seed, Purpose.VIEW, epoch, index).random(3)
        u, v = (float(draw[0]), float(draw[1])) if self.random_crop else (None, None)
        image, _ = self.view.apply(image, u, v, flip=self.flip and bool(draw[2] < 0.5))
        return sample.id, pixels_of(image, self.channels)


def collate(examples: list[Example]) -> Batch:
    """Stack examples; float32 pixels as soon as one of them is (values are in 0..255 alike)."""
    arrays = [e.pixels for e in examples]
    dtype = np.result_type(*arrays)
    return Batch(
        pixels=torch.from_numpy(np.stack([a.astype(dtype, copy=False) for a in arrays])),
        noise=torch.from_numpy(np.stack([e.noise for e in examples])),
        ids=[e.id for e in examples],
        broken={name: reason for e in examples for name, reason in e.broken.items()},
    )


@dataclass(frozen=True)
class StepSampler:
    """Positions of the stream for one process: one list per micro-batch, step after step.

    Attributes:
        batch_size: Samples per step over all processes.
        micro_batch_size: Samples per forward pass of one process.
        start_step: First step.
        max_steps: Step to end before.
        rank: This process.
        world: Number of processes.
    """

    batch_size: int
    micro_batch_size: int
    start_step: int
    max_steps: int
    rank: int
    world: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one process in one step."""
        return self.batch_size // self.world // self.micro_batch_size

    def __len__(self) -> int:
        return (self.max_steps - self.start_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for step in range(self.start_step, self.max_steps):
            first = step * self.batch_size + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def training_loader(
    stream: TrainingStream, sampler: StepSampler, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Decode a process's micro-batches in workers, ahead of the step.

    Args:
        stream: The stream.
        sampler: Which positions.
        workers: Worker processes; 0 decodes in this one.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Returns:
        A loader of `Batch`; it ends when the sampler does.
    """
    return DataLoader(
        stream,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


@dataclass
class FixedImages:
    """Samples at fixed centre crops: for validation, pictures and measuring.

    Attributes:
        pixels: `(N, H, W, C)` in 0..255.
        ids: The samples' ids.
    """

    pixels: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


def fixed_images(source: Source, view: View, channels: int, count: int, seed: int) -> FixedImages:
    """Decode a fixed choice of samples at centre crops.

    Args:
        source: The samples.
        view: Resize and crop.
        channels: Channels to read files into.
        count: How many at most; fewer when the source has fewer that can be decoded.
        seed: Seed of the choice among more samples than `count`; the source's order is kept.

    Returns:
        The images.

    Raises:
        DataError: When none can be decoded.
    """
    chosen = generator(seed, Purpose.SPLIT, 1).permutation(len(source))
    found: list[tuple[int, str, np.ndarray]] = []
    for index in chosen:
        if len(found) == count:
            break
        sample = source.read(int(index))
        try:
            image = open_image(sample.image, channels)
        except BrokenImage:
            continue
        found.append((int(index), sample.id, pixels_of(view.apply(image)[0], channels)))
    if not found:
        raise DataError(f"none of the {len(source)} samples of {source.name!r} can be decoded")
    found.sort(key=lambda entry: entry[0])
    dtype = np.result_type(*[pixels for _, _, pixels in found])
    stacked = np.stack([pixels.astype(dtype, copy=False) for _, _, pixels in found])
    return FixedImages(torch.from_numpy(stacked), [name for _, name, _ in found])


def fingerprint(source: Source) -> str:
    """A hash of a source's ids, to notice that a data set changed between two runs."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.id(index).encode() + b"\n")
    return digest.hexdigest()[:16]
