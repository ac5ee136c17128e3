"""Reading a cache for the training of a diffusion model.

A posterior draw and a flip are functions of (seed, epoch, sample): they do not depend on workers,
processes, order, or on what else is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from first_stage.seeding import Purpose, hashed_bits, standard_normals
from latent_tools.format.files import CacheError
from latent_tools.format.index import INDEX
from latent_tools.format.manifest import Manifest, check_weights
from latent_tools.format.plan import Shape
from latent_tools.format.shards import ShardReader

Sampling = Literal["posterior", "mean", "raw"]
Normalization = Literal["scale_shift", "channel", "none"]

# Of the index, what places a sample in the cache; the rest goes into the items.
_PLACES = ("unit", "row", "shard", "height", "width", "content")
_ROWS_AT_ONCE = 512
_SIZES = ("original_height", "original_width", "crop_top", "crop_left")


class LatentDataset(Dataset[dict[str, Any]]):
    """A cache as a map-style data set.

    An item is a dictionary: `latents` `(C, h, w)` float32 (with `sample="raw"` the stored tensor,
    `(2C, h, w)` for moments), `id`, `flipped`, `original_size` (height, width) and `crop` (top,
    left) as int64 tensors, and the carried columns.

    Shards are memory-mapped where an item is read; the data set can be pickled into workers.

    Args:
        path: The cache.
        sample: `posterior` draws mean + std * noise anew in every epoch; `mean` takes the mean;
            `raw` gives what is stored, not normalised. A cache without posteriors gives its latents
            for `posterior` and `mean` alike.
        normalize: `scale_shift` gives (z - shift_factor) * scaling_factor with the first stage's
            factors, as diffusers' pipelines expect; `channel` gives zero mean and unit variance per
            channel over this cache; `none` leaves latents as the encoder gives them.
        flip: Probability of reading the latent of the flipped image; `None` is 0.5 where the cache
            has flips, else 0.
        expect: The first stage (a module, or its folder or hub id) that must have made the cache.
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
        index = _read_index(self.path)
        self._places = {name: index[name].to_numpy() for name in ("unit", "row")}
        self._shapes = np.stack([index[name].to_numpy() for name in ("height", "width")], axis=1)
        self._ids = index["id"].combine_chunks()
        # Shard names repeat for a whole unit: keep each once.
        shards = index["shard"].combine_chunks().dictionary_encode()
        self._shards, self._shard_of = shards.dictionary.to_pylist(), shards.indices.to_numpy()
        self._sizes = np.stack([index[name].to_numpy() for name in _SIZES], axis=1)
        self._columns = index.drop_columns(["id", *_PLACES, *_SIZES])
        self._keys: dict[str, int] | None = None
        self._reader = ShardReader(self.path)
        # In shared memory, so that `set_epoch` reaches workers that stay alive between epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._offset, self._scale = self._normalization()

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
        from first_stage.models.first_stage import load_autoencoder

        name, revision = str(first_stage), self.manifest.first_stage["revision"]
        is_the_same = name == self.manifest.first_stage["name"]
        return load_autoencoder(name, revision if is_the_same else None)

    def _check_choices(self) -> None:
        for name, value, known in (
            ("sample", self.sample, ("posterior", "mean", "raw")),
            ("normalize", self.normalize, ("scale_shift", "channel", "none")),
        ):
            if value not in known:
                raise CacheError(f"{name} is {value!r}; it can be {', '.join(known)}")
        if self.sample == "mean" and self.manifest.representation == "sample":
            raise CacheError(
                f"{str(self.path)!r} stores samples, from which the mean cannot be had: make the "
                "cache with --representation moments, or use sample='posterior'"
            )

    def _normalization(self) -> tuple[Tensor, Tensor]:
        """Offset and scale, `(C, 1, 1)` each: normalised = (z - offset) * scale."""
        if self.normalize == "channel":
            if not self.stats:
                raise CacheError(f"{str(self.path)!r} has no samples to normalise by")
            mean, std = torch.tensor(self.stats["mean"]), torch.tensor(self.stats["std"])
            scale = 1.0 / torch.where(std > 0, std, torch.ones_like(std))
            return mean[:, None, None], scale[:, None, None]
        shape = (self.manifest.first_stage["latent_channels"], 1, 1)
        if self.normalize == "none":
            return torch.zeros(shape), torch.ones(shape)
        first_stage = self.manifest.first_stage
        return (
            torch.full(shape, first_stage["shift_factor"]),
            torch.full(shape, first_stage["scaling_factor"]),
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
        return self._ids.to_pylist()

    @property
    def shapes(self) -> np.ndarray:
        """`(len, 2)`: height and width of each sample's pixels; its bucket."""
        return self._shapes

    @property
    def units(self) -> np.ndarray:
        """`(len,)`: each sample's unit; samples are sorted by it."""
        return self._places["unit"]

    @property
    def column_names(self) -> list[str]:
        """The carried columns."""
        return list(self._columns.column_names)

    @property
    def epoch(self) -> int:
        """The epoch that draws and flips are of."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: call it before each epoch. It reaches workers that are running."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._ids)

    def index_of(self, name: str) -> int:
        """The place of an id.

        Raises:
            CacheError: When the cache does not have it.
        """
        if self._keys is None:
            self._keys = {key: place for place, key in enumerate(self.ids)}
        if name not in self._keys:
            raise CacheError(f"{str(self.path)!r} has no sample {name!r}")
        return self._keys[name]

    def stored(self, index: int, flipped: bool = False) -> Tensor:
        """What the cache stores of a sample, in float32 and not normalised.

        Args:
            index: The sample's place.
            flipped: Of the flipped image.

        Returns:
            `(2C, h, w)`, mean and then log-variance, or latents `(C, h, w)`.
        """
        return self._stored([index], [flipped])[0]

    def _stored(
        self,
        indices: Sequence[int] | np.ndarray,
        flipped: Sequence[bool],
        channels: int | None = None,
    ) -> Tensor:
        """The first channels, or all, of what the cache stores of samples of one shape.

        Returns:
            `(N, channels, h, w)` in float32.
        """
        shards = [self._shards[number] for number in self._shard_of[indices].tolist()]
        name = self.manifest.tensor_name
        names = [f"{name}_flip" if one else name for one in flipped]
        rows = self._places["row"][indices].tolist()
        places = list(zip(shards, names, rows, strict=True))
        return self._reader.rows(places, channels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item; see the class."""
        return self.__getitems__([range(len(self))[index]])[0]  # negative ones count from the end

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Many items at once, for which a `DataLoader` asks: several times faster than one by one.

        Args:
            indices: Their places; those of one shape are read together.
        """
        there = self._shapes[list(indices)]
        if len(there) == 0:
            return []
        if (there == there[0]).all():
            return self._items(list(indices))
        items: dict[int, dict[str, Any]] = {}
        for shape in np.unique(there, axis=0):
            chosen = np.flatnonzero((there == shape).all(1)).tolist()
            items |= zip(chosen, self._items([indices[n] for n in chosen]), strict=True)
        return [items[number] for number in range(len(indices))]

    def _items(self, indices: list[int]) -> list[dict[str, Any]]:
        """Items of one shape."""
        names = self._ids.take(pa.array(indices)).to_pylist()
        bits = np.zeros((len(names), 2), np.uint64)
        if self.flip > 0 or self._draws:
            bits = hashed_bits(self.seed, Purpose.LATENT, self.epoch, names)
        flipped = (bits[:, 0] * 2.0**-64 < self.flip).tolist()
        wanted = self.manifest.first_stage["latent_channels"] if self.sample == "mean" else None
        stored = self._stored(indices, flipped, wanted)
        sizes = torch.from_numpy(self._sizes[indices])
        columns: dict[str, list[Any]] = {}
        if self.column_names:
            columns = self._columns.take(pa.array(indices)).to_pydict()
        fields = {
            "latents": stored if self.sample == "raw" else self._drawn(stored, bits[:, 1]),
            "id": names,
            "flipped": flipped,
            "original_size": sizes[:, :2],
            "crop": sizes[:, 2:],
            **columns,
        }
        rows = [x.unbind() if isinstance(x, Tensor) else x for x in fields.values()]
        return [dict(zip(fields, row, strict=True)) for row in zip(*rows, strict=True)]

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
            latents: `(..., C, h, w)`, normalised as this data set does.
        """
        offset, scale = self._offset.to(latents), self._scale.to(latents)
        return latents / scale + offset

    @torch.no_grad()
    def decode_preview(
        self, ids: Sequence[str], first_stage: nn.Module | str | None = None
    ) -> list[Tensor]:
        """Decode the means (or stored latents) of some samples.

        Args:
            ids: Their ids.
            first_stage: A diffusers autoencoder, or its folder or hub id; the one that made the
                cache when `None`. Its encoder must be the one that did, its decoder need not.

        Returns:
            For each an image `(C_in, H, W)` in [-1, 1], not clamped, on the CPU.
        """
        autoencoder = self._first_stage(first_stage or self.manifest.first_stage["name"])
        check_weights(self.manifest, autoencoder, self.path)
        channels = self.manifest.first_stage["latent_channels"]
        device = next(autoencoder.parameters()).device
        images = []
        for name in ids:
            latents = self.stored(self.index_of(name))[None, :channels].to(device)
            images.append(autoencoder.decode(latents, return_dict=False)[0][0].float().cpu())  # type: ignore[operator]
        return images

    def to_datasets(self, shape: Shape | None = None) -> Any:
        """The cache as a `datasets.Dataset`: what is stored, raw, beside ids, sizes and columns.

        It is held in memory; `save_to_disk` writes it.

        Args:
            shape: (height, width) of the bucket to take; needed when there are several.

        Returns:
            A data set with the column `moments` or `latents` (`Array3D`, float16 when that is what
            the cache stores), `moments_flip` or `latents_flip` when there are flips, `id`,
            `original_size`, `crop`, and the carried columns.

        Raises:
            CacheError: When there are several buckets and none was named.
        """
        import datasets

        chosen = self.of_shape(shape)
        first = self.stored(int(chosen[0]))
        dtype = "float16" if self.manifest.store["dtype"] == "float16" else "float32"
        names = [self.manifest.tensor_name]
        if self.manifest.store["flip"]:
            names.append(f"{names[0]}_flip")
        features = datasets.Features(
            {name: datasets.Array3D(tuple(first.shape), dtype) for name in names}
            | {"id": datasets.Value("string")}
            | {
                name: datasets.Sequence(datasets.Value("int64"), 2)
                for name in ("original_size", "crop")
            }
            | dict(datasets.Features.from_arrow_schema(self._columns.schema))
        )
        parts = []
        for start in range(0, len(chosen), _ROWS_AT_ONCE):
            rows = chosen[start : start + _ROWS_AT_ONCE]
            table: dict[str, Any] = {
                name: self._stored(rows, [name.endswith("_flip")] * len(rows)).numpy()
                for name in names
            }
            table = {name: values.astype(dtype) for name, values in table.items()}
            table["id"] = self._ids.take(pa.array(rows)).to_pylist()
            sizes = self._sizes[rows].tolist()
            table["original_size"] = [size[:2] for size in sizes]
            table["crop"] = [size[2:] for size in sizes]
            table |= self._columns.take(pa.array(rows)).to_pydict()
            parts.append(datasets.Dataset.from_dict(table, features=features))
        return datasets.concatenate_datasets(parts)

    def of_shape(self, shape: Shape | None) -> np.ndarray:
        """Places of the samples of one bucket; `None` where there is only one.

        Raises:
            CacheError: Naming the buckets there are.
        """
        there = sorted({(int(h), int(w)) for h, w in self.shapes})
        if shape is None and len(there) == 1:
            shape = there[0]
        if shape not in there:
            names = ", ".join(f"({h}, {w})" for h, w in there) or "none"
            raise CacheError(f"shape is {shape}; {str(self.path)!r} has the shapes {names}")
        return np.flatnonzero((self.shapes == shape).all(1))


def _read_index(folder: Path) -> pa.Table:
    path = folder / INDEX
    if not path.exists():
        raise CacheError(
            f"the cache {str(folder)!r} is not finished (it has no {INDEX}): start the command "
            "that makes it again; it goes on where it stopped"
        )
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CacheError(
            f"{str(path)!r} cannot be read ({error}): start the command that makes the cache "
            "again; it writes the index anew"
        ) from error
