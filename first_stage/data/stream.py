"""Batches for training: an endless stream of samples, each position a pure function of the seed.

Position n of the stream is sample `order(epoch)[n % N]` of epoch `n // N`; step k trains on the
positions k * batch_size ... (k + 1) * batch_size - 1. Each process takes its contiguous slice of a
step's positions, so what a step sees does not depend on the number of processes or workers, and
resuming means starting at a step. No sampler pads or drops: a data set smaller than a batch just
comes round again.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from first_stage.data.broken import BrokenImage
from first_stage.data.decode import Reading, as_reading, open_image
from first_stage.data.files import read_bytes
from first_stage.data.images import View, pixels_of
from first_stage.data.paired import PairedLatents
from first_stage.data.paths import Paths
from first_stage.data.sample import Sample, Source
from first_stage.data.sources import SubsetSource
from first_stage.data.variation import Variation
from first_stage.errors import DataError
from first_stage.seeding import Purpose, generator

_CONTENT_SAMPLES = 256
_LOOK_FURTHER = 100
"""How many unreadable samples in a row are skipped before the data counts as unusable."""


@dataclass
class Batch:
    """One micro-batch of one process.

    Attributes:
        pixels: `(B, H, W, C)` in 0..255, uint8, or float32 when a 16-bit file is among them.
        positions: The samples' places in the stream; whatever a step draws follows from them.
        ids: The samples' ids.
        broken: Ids and reasons of the samples that could not be decoded and were skipped.
        encoded: What the encoder once gave for them, as `PairedLatents` have it, stacked; `None`
            where it is to be run.
    """

    pixels: Tensor
    positions: list[int]
    ids: list[str]
    broken: dict[str, str] = field(default_factory=dict)
    encoded: Tensor | None = None

    def pin_memory(self) -> "Batch":
        """Called by the `DataLoader`'s pinning thread."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors; asynchronous where the memory is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        encoded = None if self.encoded is None else change(self.encoded)
        return replace(self, pixels=change(self.pixels), encoded=encoded)


@dataclass(frozen=True)
class Example:
    """One decoded sample: see `Batch` for the fields."""

    pixels: np.ndarray
    position: int
    id: str
    broken: dict[str, str]
    encoded: Tensor | None = None


@dataclass(frozen=True)
class Later:
    """Another view from some place on.

    Attributes:
        position: The first place in the stream that is seen so; the first one of a step.
        view: How.
    """

    position: int
    view: View


class TrainingStream(Dataset[Example]):
    """The endless stream of samples, indexed by position.

    Args:
        source: The samples.
        view: Resize and crop.
        reading: How files are read, or just into how many channels.
        seed: The run's seed.
        variation: What differs from epoch to epoch.
        latents: What the encoder once gave for the samples, seen so; `None` where it is to be run.
        later: From where on the view is another one; `None`: nowhere.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        reading: Reading | int,
        seed: int,
        variation: Variation = Variation(),  # noqa: B008, it is frozen
        latents: PairedLatents | None = None,
        later: Later | None = None,
    ):
        self.source, self.view, self.seed = source, view, seed
        self.reading = as_reading(reading)
        self.variation, self.latents, self.later = variation, latents, later
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
            place = self.replacement(position, ahead)
            epoch, index = self.sample_at(place)
            sample = self.read(place, index)
            try:
                pixels, encoded = self._decode(self.view_at(position), epoch, index, sample)
            except BrokenImage as error:
                broken[sample.id] = str(error)
                continue
            return Example(pixels, position, sample.id, broken, encoded)
        first, reason = next(iter(broken.items()))
        raise DataError(
            f"{len(broken)} samples in a row of {self.source.name!r} cannot be decoded "
            f"(first: {first}: {reason})"
        )

    def replacement(self, position: int, ahead: int) -> int:
        """The position whose sample takes the place of one that cannot be decoded.

        Args:
            position: The place to fill.
            ahead: How many were tried before; 0 is the position itself.
        """
        return position + ahead

    def read(self, position: int, index: int) -> Sample:
        """Read the sample at a position; what is in the file is not decoded yet."""
        return self.source.read(index)

    def view_at(self, position: int) -> View:
        """How the sample at a position is seen, before anything is drawn."""
        if self.later is None or position < self.later.position:
            return self.view
        return self.later.view

    def _decode(
        self, view: View, epoch: int, index: int, sample: Sample
    ) -> tuple[np.ndarray, Tensor | None]:
        file, encoded = sample.image, None
        if self.latents is not None and isinstance(file, Path):
            file = read_bytes(file)
        draw = generator(self.seed, Purpose.VIEW, epoch, index).random(Variation.NUMBERS)
        view, mirror = self.variation.view(view, draw), self.variation.mirror(draw)
        image = open_image(file, self.reading, view.scale)
        if self.latents is not None:
            encoded = self.latents.of(index, file, mirror.horizontal)
        image, _ = view.apply(image, *self.variation.place(draw), flip=mirror)
        return self.variation.colors(pixels_of(image, self.reading), draw), encoded


def collate(examples: list[Example]) -> Batch:
    """Stack examples; float32 pixels as soon as one of them is (values are in 0..255 alike)."""
    arrays = [e.pixels for e in examples]
    dtype = np.result_type(*arrays)
    given = [e.encoded for e in examples if e.encoded is not None]
    return Batch(
        pixels=torch.from_numpy(np.stack([a.astype(dtype, copy=False) for a in arrays])),
        positions=[e.position for e in examples],
        ids=[e.id for e in examples],
        broken={name: reason for e in examples for name, reason in e.broken.items()},
        encoded=torch.stack(given) if len(given) == len(examples) else None,
    )


@dataclass(frozen=True)
class StepSampler:
    """Positions of the stream for one process: one list per micro-batch, step after step.

    Attributes:
        batch_size: Samples per step over all processes.
        micro_batch_size: Samples per forward pass of one process.
        steps: The steps, in the order in which they are taken.
        rank: This process.
        world: Number of processes.
    """

    batch_size: int
    micro_batch_size: int
    steps: Sequence[int]
    rank: int
    world: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one process in one step."""
        return self.batch_size // self.world // self.micro_batch_size

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for step in self.steps:
            first = step * self.batch_size + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def fingerprint(source: Source) -> str:
    """A hash that tells whether a data set changed between two runs.

    It covers the ids of all samples and the files of up to 256 of them, spread evenly: samples that
    were added, removed or renamed are always noticed, and so is a set that was resized or encoded
    anew; a single file that was replaced under its old name mostly is not. Sources that know a
    better way have a method `fingerprint` of their own.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return str(own())
    return _with_contents(hashlib.sha256(_digest_of_ids(source)), source)


def earlier_fingerprint(source: Source) -> str:
    """The fingerprint as checkpoints of version 0.1 hold it: over each id, one by one."""
    own = getattr(source, "earlier_fingerprint", None)
    if own is not None:
        return str(own())
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.id(index).encode() + b"\n")
    return _with_contents(digest, source)


def _with_contents(digest: "hashlib._Hash", source: Source) -> str:
    count = len(source)
    for index in np.unique(np.linspace(0, count - 1, _CONTENT_SAMPLES).round().astype(int)):
        image = source.read(int(index)).image
        if isinstance(image, Path):
            with contextlib.suppress(BrokenImage):  # the loader's to report
                image = read_bytes(image)
        digest.update(hashlib.sha256(image).digest() if isinstance(image, bytes) else b"")
    return digest.hexdigest()[:16]


def _digest_of_ids(source: Source) -> bytes:
    """A hash over all ids in their order, by column where the source keeps them so."""
    if isinstance(source, SubsetSource):
        return hashlib.sha256(_digest_of_ids(source.source) + source.indices.tobytes()).digest()
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return str(own()).encode()
    paths: Paths | None = getattr(source, "paths", None)
    if paths is not None:
        return paths.digest().digest()
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.id(index).encode() + b"\n")
    return digest.digest()
