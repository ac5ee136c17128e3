"""A finished cache as the exports read it: sample by sample, in the order of its units."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from first_stage.seeding import Purpose, generator
from latent_tools.build.encode import sample_key
from latent_tools.format.files import CacheError
from latent_tools.format.index import INDEX
from latent_tools.format.shards import LABEL_COLUMNS, read_commit
from latent_tools.read.dataset import LatentDataset

Draw = Literal["posterior", "mean"]


class ExportCache:
    """What an export reads of a cache.

    Args:
        path: The cache.
        draw: For formats that hold latents rather than moments: one draw from each posterior, or
            its mean; `None` draws where there is a posterior, and takes what is stored where not.
        seed: Seed of the draws.

    Raises:
        CacheError: When the cache is not finished or is empty, or does not have what `draw` names.
    """

    def __init__(self, path: Path, draw: Draw | None = None, seed: int = 0):
        self.path, self.seed = path, seed
        self.dataset = LatentDataset(path, sample="raw", normalize="none", flip=0.0)
        self.manifest = self.dataset.manifest
        if len(self.dataset) == 0:
            raise CacheError(f"{str(path)!r} holds no samples: there is nothing to export")
        self.draw = self._checked(draw)
        self.index: pa.Table = pq.read_table(path / INDEX)
        self.ids: list[str] = self.dataset.ids
        self.labels = _labels(self.index)

    def _checked(self, draw: Draw | None) -> str:
        stored = self.manifest.representation
        if stored == "moments":
            return draw or "posterior"
        if stored == "tokens" and draw is not None:
            raise CacheError(
                f"draw is {draw!r}, but {str(self.path)!r} stores tokens: leave --draw out"
            )
        if draw is not None and {"posterior": "sample", "mean": "mean"}[draw] != stored:
            raise CacheError(
                f"draw is {draw!r}, but {str(self.path)!r} stores each posterior's {stored} alone: "
                "leave --draw out to export that, or make the cache with --representation moments"
            )
        return stored

    @property
    def has_posterior(self) -> bool:
        """Whether the cache stores moments."""
        return self.manifest.representation == "moments"

    @property
    def has_flips(self) -> bool:
        """Whether the cache has latents of the flipped images."""
        return bool(self.manifest.store["flip"])

    @property
    def scaling_factor(self) -> float:
        """The first stage's."""
        return float(self.manifest.first_stage["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        """The first stage's."""
        return float(self.manifest.first_stage["shift_factor"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Pixel shapes (height, width) in the cache, sorted."""
        return sorted({(int(h), int(w)) for h, w in self.dataset.shapes})

    def units(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number and places of the samples of every unit that has any, in order."""
        units = self.dataset.units
        places = np.arange(len(units))
        for rows in np.split(places, np.flatnonzero(np.diff(units)) + 1):
            yield int(units[rows[0]]), rows

    def digest(self, unit: int) -> str:
        """SHA-256 of a unit's shard, as its commit has it."""
        return str(read_commit(self.path, unit)["sha256"])

    def shard(self, place: int) -> Path:
        """The file that holds a sample."""
        return self.path / "shards" / self.index["shard"][place].as_py()

    def moments(self, place: int, flipped: bool = False) -> np.ndarray:
        """Mean and then log-variance, `(2C, h, w)` float32, raw."""
        return self.dataset.stored(place, flipped).numpy()

    def latents(self, place: int, flipped: bool = False) -> np.ndarray:
        """A draw, or the mean, or what is stored: `(C, h, w)` float32, raw.

        A draw is a function of seed, id and flip: the same whatever else is exported.
        """
        stored = self.dataset.stored(place, flipped)
        if not self.has_posterior:
            return stored.numpy()
        mean, logvar = stored.chunk(2)
        if self.draw == "mean":
            return mean.numpy()
        key = sample_key(self.ids[place])
        draw = generator(self.seed, Purpose.LATENT, 0, key, int(flipped))
        noise = torch.from_numpy(draw.standard_normal(mean.shape, dtype=np.float32))
        return (mean + torch.exp(0.5 * logvar) * noise).numpy()

    def tokens(self, place: int, flipped: bool = False) -> np.ndarray:
        """Numbers of codes `(h, w)`, uint16 or uint32 as they are stored."""
        stored = self.dataset.stored(place, flipped).numpy()
        return stored.astype(self.manifest.store["dtype"])

    def row(self, place: int) -> dict[str, Any]:
        """The index's entry of a sample: id, sizes, crop, carried columns."""
        return self.index.slice(place, 1).to_pylist()[0]


def relative_path(name: str) -> PurePosixPath:
    """An id as a path below the export's folder.

    Raises:
        CacheError: When it would lead out of that folder, or is no path.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or {"\\", "\0"} & set(name):
        raise CacheError(
            f"the sample {name!r} cannot name a file below the output folder: this format needs "
            "ids that are relative paths"
        )
    return path


def _labels(index: pa.Table) -> np.ndarray | None:
    """The integer label of every sample, `(N,)` int64; `None` when some have none."""
    for name in LABEL_COLUMNS:
        if name in index.column_names:
            column = index[name]
            if pa.types.is_integer(column.type) and column.null_count == 0:
                return column.to_numpy().astype(np.int64)
    return None
