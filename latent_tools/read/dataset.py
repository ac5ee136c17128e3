"""Reading a cache for the training of a diffusion model.

A posterior draw and a flip are functions of (seed, epoch, sample): they do not depend on workers,
processes, order, or on what else is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from first_stage.seeding import Purpose, hashed_bits, standard_normals
from latent_tools.format.files import CacheError
from latent_tools.format.index import Index, UnitTable
from latent_tools.format.manifest import Manifest, check_weights
from latent_tools.format.plan import Shape
from latent_tools.format.shards import ShardReader
from latent_tools.read.as_datasets import as_datasets
from latent_tools.read.epoch import Epoch, let_readers_begin_now, loader_of_accelerate
from latent_tools.read.normalization import (
    Normalization,
    Sampling,
    check_statistics,
    normalization,
)


class LatentDataset(Dataset[dict[str, Any]]):
    """A cache as a map-style data set.

    An item is a dictionary: `latents` `(C, h, w)` float32 (with `sample="raw"` the stored tensor,
    `(2C, h, w)` for moments), `id`, `flipped`, `original_size` (height, width) and `crop` (top,
    left) as int64 tensors, and the carried columns.

    Index and shards are memory-mapped, so that a data set takes the same memory at any number of
    samples, and workers share it; it can be pickled into workers.

    Args:
        path: The cache.
        sample: `posterior` draws mean + std * noise anew in every epoch; `mean` takes the mean;
            `raw` gives what is stored, not normalized; `tokens` gives the numbers of codes
            `(h, w)` int64, as the item's `tokens`, of a cache that stores them. A cache without
            posteriors gives its latents for `posterior` and `mean` alike.
        normalize: `scale_shift` gives what diffusers' pipelines expect by the first stage's config:
            (z - shift_factor) * scaling_factor, or, where it has the lists,
            (z - latents_mean) * scaling_factor / latents_std; `channel` gives zero mean and unit
            variance per channel over this cache; `none` leaves latents as the encoder gives them.
        flip: Probability of reading the latent of the flipped image; `None` is 0.5 where the cache
            has flips, else 0.
        expect: The first stage (a module, or its folder or hub id) that must have made the cache
            and, for `scale_shift`, have the same factors still.
        seed: Seed of the draws.

    Raises:
        CacheError: When the cache is not finished, was made by another first stage than `expect`,
            or lacks what is asked for.
    """

    def __init__(
        self,
        path: str | Path,
        sample: Sampling = "posterior",
        normalize: Normalization = "scale_shift",
        flip: float | None = None,
        expect: nn.Module | str | Path | None = None,
        seed: int = 0,
    ):
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.sample, self.normalize, self.seed = sample, normalize, seed
        self.flip = self._flip_probability(flip)
        self._check_choices()
        if expect is not None:
            autoencoder = self._first_stage(expect)
            check_weights(self.manifest, autoencoder, self.path)
            if normalize == "scale_shift" and sample != "raw":
                check_statistics(self.manifest, autoencoder, self.path)
        self._index = Index(self.path)
        self._reader = ShardReader(self.path)
        self._epoch = Epoch()
        self._offset, self._scale = normalization(self.manifest, normalize, sample, self.path)

    def _flip_probability(self, flip: float | None) -> float:
        has_flips = bool(self.manifest.store["flip"])
        if flip is None:
            return 0.5 if has_flips else 0.0
        if not 0.0 <= flip <= 1.0:
            raise CacheError(f"flip is {flip}; a probability lies in [0, 1]")
        if flip > 0 and not has_flips:
            raise CacheError(
                f"flip is {flip}, but {str(self.path)!r} has no latents of flipped images (a "
                "mirrored latent is not one): set flip=0, or make the cache with --flip"
            )
        return flip

    def _first_stage(self, first_stage: nn.Module | str | Path) -> nn.Module:
        if isinstance(first_stage, nn.Module):
            return first_stage
        # Reading latents needs no diffusers, whose import takes seconds in every worker.
        from first_stage.models.loading import load_autoencoder

        name, revision = str(first_stage), self.manifest.first_stage["revision"]
        is_the_same = name == self.manifest.first_stage["name"]
        return load_autoencoder(name, revision if is_the_same else None)

    def _check_choices(self) -> None:
        for name, value, known in (
            ("sample", self.sample, ("posterior", "mean", "raw", "tokens")),
            ("normalize", self.normalize, ("scale_shift", "channel", "none")),
        ):
            if value not in known:
                raise CacheError(f"{name} is {value!r}; it can be {', '.join(known)}")
        if (self.sample == "tokens") != self.manifest.holds_tokens and self.sample != "raw":
            stored = self.manifest.representation
            remedy = (
                "use sample='tokens', or make the cache with --representation mean for latents"
                if self.manifest.holds_tokens
                else "make the cache with --representation tokens, of a first stage with a codebook"
            )
            raise CacheError(
                f"sample is {self.sample!r}, but {str(self.path)!r} stores {stored}: {remedy}"
            )
        if self.sample == "mean" and self.manifest.representation == "sample":
            raise CacheError(
                f"{str(self.path)!r} stores samples, from which the mean cannot be had: make the "
                "cache with --representation moments, or use sample='posterior'"
            )

    @property
    def _draws(self) -> bool:
        """Whether an item's latents are drawn from its posterior."""
        return self.sample == "posterior" and self.manifest.representation == "moments"

    @property
    def stats(self) -> dict[str, Any]:
        """The cache's statistics: see `latent_tools.format.statistics.summary`."""
        return self.manifest.statistics

    @property
    def ids(self) -> list[str]:
        """The ids in order."""
        return self._index.column("id").to_pylist()

    @property
    def unit_table(self) -> UnitTable:
        """The units in order; each unit's samples lie side by side."""
        return self._index.units

    @property
    def shapes(self) -> np.ndarray:
        """`(len, 2)`: height and width of each sample's pixels; its bucket."""
        return np.repeat(self.unit_table.shapes, np.diff(self.unit_table.starts), axis=0)

    @property
    def units(self) -> np.ndarray:
        """`(len,)`: each sample's unit; samples are sorted by it."""
        return np.repeat(self.unit_table.numbers, np.diff(self.unit_table.starts))

    @property
    def column_names(self) -> list[str]:
        """The carried columns."""
        return self._index.column_names

    def column(self, name: str) -> pa.ChunkedArray:
        """A carried column, or `id`, of all samples; mapped, not loaded."""
        return self._index.column(name)

    @property
    def epoch(self) -> int:
        """The epoch that draws and flips are of."""
        return self._epoch.number

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: call it before each epoch. It reaches workers that are running.

        A loader prepared by `accelerate` calls this too, with a count of its own that begins at 0
        after each restart: that count goes on from the epoch that the training loop set last.
        """
        self.tell_epoch(epoch, loader_of_accelerate())

    def tell_epoch(self, epoch: int, counts: Any) -> None:
        """Set the epoch, or take the count of its passes of a loader of accelerate; see `Epoch`.

        Args:
            epoch: The epoch, or the count.
            counts: The loader whose count it is; `None` when the training loop says the epoch.
        """
        if counts is not None:
            let_readers_begin_now(counts)
            self._epoch.count(epoch)
        else:
            self._epoch.tell(epoch)

    def restore_epoch(self, epoch: int, reader: int) -> None:
        """Take the epoch of a reader's saved state, unless the training loop has set one."""
        self._epoch.restore(epoch, reader)

    def check_worker(self) -> None:
        """Refuse to go on, in a worker that began before the epoch was set; see `Epoch`."""
        if get_worker_info() is not None:
            self._epoch.check_worker()

    @property
    def is_epoch_told(self) -> bool:
        """Whether the training loop has set the epoch."""
        return self._epoch.is_told

    def __len__(self) -> int:
        return len(self._index)

    def index_of(self, name: str) -> int:
        """The place of an id, looked for among all.

        Raises:
            CacheError: When the cache does not have it.
        """
        if (place := self._index.find(name)) < 0:
            raise CacheError(f"{str(self.path)!r} has no sample {name!r}")
        return place

    def stored(self, index: int, flipped: bool = False) -> Tensor:
        """What the cache stores of a sample, in float32 and not normalized.

        Args:
            index: The sample's place.
            flipped: Of the flipped image.

        Returns:
            `(2C, h, w)`, mean and then log-variance, or latents `(C, h, w)`, or tokens `(h, w)`.
        """
        return self._stored([index], [flipped])[0]

    def _stored(
        self,
        indices: Sequence[int] | np.ndarray,
        flipped: Sequence[bool],
        channels: int | None = None,
    ) -> Tensor:
        """The first channels, or all, of what the cache stores: `(N, channels, h, w)` float32.

        All samples are of one shape.
        """
        table, wanted = self.unit_table, np.asarray(indices)
        units = table.of(wanted)
        rows = (wanted - table.starts[units]).tolist()
        shards = [table.shards[unit] for unit in units.tolist()]
        name = self.manifest.tensor_name
        names = [f"{name}_flip" if one else name for one in flipped]
        places = list(zip(shards, names, rows, strict=True))
        return self._reader.rows(places, channels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item; see the class."""
        return self.__getitems__([range(len(self))[index]])[0]  # negative ones count from the end

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Many items at once, for which a `DataLoader` asks: several times faster than one by one.

        Args:
            indices: Their places; those of one shape are read together.

        Raises:
            CacheError: When this is a worker that drew items before the epoch was set.
        """
        if self.flip > 0 or self._draws:
            self.check_worker()
        return self.items(indices, self.epoch)

    def items(self, indices: Sequence[int], epoch: int) -> list[dict[str, Any]]:
        """Items with the draws and flips of an epoch.

        Args:
            indices: Their places.
            epoch: The epoch, whatever the data set is at.
        """
        if len(indices) == 0:
            return []
        if self.unit_table.has_one_shape:
            return self._items(list(indices), epoch)
        there = self.unit_table.shapes[self.unit_table.of(np.asarray(indices))]
        if (there == there[0]).all():
            return self._items(list(indices), epoch)
        items: dict[int, dict[str, Any]] = {}
        for shape in np.unique(there, axis=0):
            chosen = np.flatnonzero((there == shape).all(1)).tolist()
            items |= zip(chosen, self._items([indices[n] for n in chosen], epoch), strict=True)
        return [items[number] for number in range(len(indices))]

    def _items(self, indices: list[int], epoch: int) -> list[dict[str, Any]]:
        """Items of one shape."""
        rows = np.asarray(indices)
        names = self._index.values("id", rows)
        bits = np.zeros((len(names), 2), np.uint64)
        if self.flip > 0 or self._draws:
            bits = hashed_bits(self.seed, Purpose.LATENT, epoch, names)
        flipped = (bits[:, 0] * 2.0**-64 < self.flip).tolist()
        wanted = self.manifest.first_stage["latent_channels"] if self.sample == "mean" else None
        stored = self._stored(rows, flipped, wanted)
        sizes = torch.from_numpy(self._index.sizes(rows))
        fields = {
            **self._values(stored, bits[:, 1]),
            "id": names,
            "flipped": flipped,
            "original_size": sizes[:, :2],
            "crop": sizes[:, 2:],
            **{name: self._index.values(name, rows) for name in self.column_names},
        }
        lists = [x.unbind() if isinstance(x, Tensor) else x for x in fields.values()]
        return [dict(zip(fields, item, strict=True)) for item in zip(*lists, strict=True)]

    def _values(self, stored: Tensor, seeds: np.ndarray) -> dict[str, Tensor]:
        """The items' tensor under its name."""
        if self.manifest.holds_tokens:
            return {"tokens": stored.long()}
        return {"latents": stored if self.sample == "raw" else self._drawn(stored, seeds)}

    def _drawn(self, stored: Tensor, seeds: np.ndarray) -> Tensor:
        """Normalised latents `(N, C, h, w)` of what is stored; a draw each, if draws are wanted."""
        latents = stored
        if self._draws:
            mean, logvar = stored.chunk(2, dim=1)
            deviation = logvar.mul_(0.5).exp_()
            latents = standard_normals(seeds, mean.shape[1:]).mul_(deviation).add_(mean)
        if self.normalize == "none":
            return latents
        return latents.sub_(self._offset).mul_(self._scale)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Items' latents as the first stage's decoder takes them.

        Args:
            latents: `(..., C, h, w)`, normalized as this data set does.
        """
        offset, scale = self._offset.to(latents), self._scale.to(latents)
        return latents / scale + offset

    @torch.no_grad()
    def decode_preview(
        self, ids: Sequence[str], first_stage: nn.Module | str | None = None
    ) -> list[Tensor]:
        """Decode the means (or stored latents, or tokens) of some samples.

        Args:
            ids: Their ids.
            first_stage: A diffusers autoencoder, or its folder or hub id; the one that made the
                cache when `None`. Its encoder must be the one that did, its decoder need not.

        Returns:
            For each an image `(C_in, H, W)` in [-1, 1], not clamped, on the CPU.
        """
        # Reading latents needs no diffusers, whose import takes seconds in every worker.
        from first_stage.models.first_stage import as_first_stage

        autoencoder = self._first_stage(first_stage or self.manifest.first_stage["name"])
        check_weights(self.manifest, autoencoder, self.path)
        channels = self.manifest.first_stage["latent_channels"]
        stage = as_first_stage(autoencoder, "first_stage")
        images = []
        for name in ids:
            stored = self.stored(self.index_of(name))[None].to(stage.device)
            if self.manifest.holds_tokens:
                decoded = stage.decode_tokens(stored.long())
            else:
                decoded = stage.decode(stored[:, :channels])
            images.append(decoded[0].cpu())
        return images

    def to_datasets(self, shape: Shape | None = None) -> Any:
        """The cache as a `datasets.Dataset`: what is stored, raw, beside ids, sizes and columns.

        It is held in memory; `save_to_disk` writes it.

        Args:
            shape: (height, width) of the bucket to take; needed when there are several.

        Returns:
            A data set with the column `moments`, `latents` (`Array3D`) or `tokens` (`Array2D`), the
            same with `_flip` when there are flips, `id`, `original_size`, `crop`, and the columns.

        Raises:
            CacheError: When there are several buckets and none was named.
        """
        return as_datasets(self.manifest, self._index, self.of_shape(shape), self._stored)

    def of_shape(self, shape: Shape | None) -> np.ndarray:
        """Places of the samples of one bucket; `None` where there is only one.

        Raises:
            CacheError: Naming the buckets there are.
        """
        table = self.unit_table
        parts = [
            np.arange(table.starts[unit], table.starts[unit + 1])
            for unit in self.units_of_shape(shape).tolist()
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def units_of_shape(self, shape: Shape | None) -> np.ndarray:
        """Places in `unit_table` of the units of one bucket; `None` where there is only one.

        Raises:
            CacheError: Naming the buckets there are.
        """
        table = self.unit_table
        there = sorted({(int(h), int(w)) for h, w in table.shapes})
        if shape is None and len(there) == 1:
            shape = there[0]
        if shape not in there:
            names = ", ".join(f"({h}, {w})" for h, w in there) or "none"
            raise CacheError(f"shape is {shape}; {str(self.path)!r} has the shapes {names}")
        return np.flatnonzero((table.shapes == shape).all(1))
