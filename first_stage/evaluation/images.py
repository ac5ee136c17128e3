"""The images of an evaluation: a fixed, ordered list, dealt to processes in whole batches.

Batch k holds the images `k * batch_size ... (k + 1) * batch_size - 1` of the list whatever the
number of processes; process r takes the batches with `k % world == r`. Nothing is padded, so no
image counts twice or is left out, and every image meets the same neighbours in its batch, so that
rounding in the networks does not depend on the number of processes either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from first_stage.data import (
    BrokenImage,
    FixedImages,
    Reading,
    Source,
    View,
    deliver,
    images_from_pixels,
    open_image,
    pixels_of,
    prepare_worker,
)
from first_stage.data.decode import as_reading
from first_stage.errors import DataError
from first_stage.seeding import Purpose, generator


@dataclass(frozen=True)
class Item:
    """One image of the list.

    Attributes:
        index: Its place in the list.
        id: Its id.
        pixels: `(H, W, C)` in 0..255, or `None` when it cannot be decoded.
        problem: Why not.
    """

    index: int
    id: str
    pixels: np.ndarray | None
    problem: str = ""


class EvaluationImages(Dataset[Item]):
    """Images of a source.

    Args:
        source: The samples.
        reading: How files are read, or just into how many channels.
        view: Resize and centre crop; `None` leaves images as they are.
        count: How many images at most; a seeded choice among more. `None` takes all.
        seed: Seed of the choice; the source's order is kept.
    """

    def __init__(
        self,
        source: Source,
        reading: Reading | int,
        view: View | None = None,
        count: int | None = None,
        seed: int = 0,
    ):
        self.source, self.reading, self.view = source, as_reading(reading), view
        self.chosen = np.arange(len(source))
        if count is not None and count < len(source):
            order = generator(seed, Purpose.SPLIT, 2).permutation(len(source))
            self.chosen = np.sort(order[:count])
        self.described: dict[str, Any] = {
            "data": source.name,
            "images_available": len(source),
            "resize": _resize_words(view),
            "crop": f"centre, {view.size[1]} x {view.size[0]}" if view else "none",
            **self.reading.describe(),
        }

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Item:
        """Decode an image of the list."""
        sample = self.source.read(int(self.chosen[index]))
        try:
            image = open_image(sample.image, self.reading)
            if self.view is not None:
                image = self.view.apply(image)[0]
        except BrokenImage as error:
            return Item(index, sample.id, None, str(error))
        return Item(index, sample.id, pixels_of(image, self.reading))


class HeldImages(Dataset[Item]):
    """Images that are already in memory, such as a training run's held-out ones.

    Args:
        images: The images.
        name: Where they come from.
        described: What the protocol should say about resize and crop.
    """

    def __init__(self, images: FixedImages, name: str, described: dict[str, Any] | None = None):
        self.images = images
        self.reading = images.reading or Reading(int(images.pixels.shape[-1]))
        side = tuple(images.pixels.shape[1:3])
        self.described: dict[str, Any] = {
            "data": name,
            "images_available": len(images),
            "resize": "as given",
            "crop": f"centre, {side[1]} x {side[0]}",
            **self.reading.describe(),
            **(described or {}),
        }

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        """An image of the list."""
        return Item(index, self.images.ids[index], self.images.pixels[index].numpy())


def _resize_words(view: View | None) -> str:
    if view is None:
        return "none"
    smaller = "smaller images are enlarged to fit the crop"
    if view.shape is not None:
        return "until the image just covers the crop, bicubic, antialiased"
    if view.resize is None:
        return f"none; {smaller}"
    return f"shorter side to {max(view.resize, view.resolution)}, bicubic, antialiased"


ImageList = EvaluationImages | HeldImages


@dataclass
class Group:
    """Images of one shape, out of one batch.

    Attributes:
        indices: Their places in the list.
        ids: Their ids.
        images: `(B, C, H, W)` float32 in [-1, 1].
    """

    indices: list[int]
    ids: list[str]
    images: Tensor


def batches(
    images: ImageList, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[list[Group], list[Item]]]:
    """One process's batches, decoded.

    Args:
        images: The list.
        batch_size: Images per batch.
        rank: This process.
        world: Number of processes.
        workers: Decoding processes; 0 decodes in this one.

    Yields:
        A batch's images grouped by shape, and those of it that cannot be decoded.

    Raises:
        UserError: When a worker dies.
    """
    starts = range(rank * batch_size, len(images), world * batch_size)
    plan = [list(range(s, min(s + batch_size, len(images)))) for s in starts]
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=plan,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=prepare_worker,
    )
    for items in deliver(loader):
        yield group_by_shape(items), [item for item in items if item.pixels is None]


def group_by_shape(items: Sequence[Item]) -> list[Group]:
    """Stack the decoded items of equal shape, in order of first appearance."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        if item.pixels is not None:
            groups.setdefault(item.pixels.shape, []).append(item)
    result = []
    for members in groups.values():
        pixels = np.stack([np.asarray(m.pixels, dtype=np.float32) for m in members])
        images = images_from_pixels(torch.from_numpy(pixels))
        result.append(Group([m.index for m in members], [m.id for m in members], images))
    return result


def require_some(decoded: int, broken: dict[str, str], name: str) -> None:
    """Refuse a list of which nothing could be decoded.

    Raises:
        DataError: With the first reason.
    """
    if decoded == 0:
        first = next(iter(broken.items()), ("", "it is empty"))
        raise DataError(
            f"none of the {len(broken)} images of {name!r} can be decoded "
            f"(first: {first[0]}: {first[1]})"
        )
