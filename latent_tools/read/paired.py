"""A cache as a decoder's teacher: its latents beside the images that they were made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from first_stage.data import BrokenImage, Encoded, Reading, Source, View
from latent_tools.format.content import content_hash
from latent_tools.format.files import CacheError
from latent_tools.format.index import INDEX
from latent_tools.format.manifest import describe_preprocessing
from latent_tools.read.dataset import LatentDataset

_CHANGED = "changed since its latents were cached"
_NOT_THERE = "has no latents in the cache"


class CachedLatents:
    """A cache whose latents a decoder is to learn from; see `first_stage.data.paired`.

    Args:
        path: The cache.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def pair(
        self,
        model: Any,
        source: Source,
        *,
        reading: Reading,
        view: View,
        flips: bool,
        missing: float,
    ) -> "Paired":
        """Find the latents of a source's samples, by their ids.

        Args:
            model: The diffusers autoencoder whose encoder must have made the cache.
            source: The samples.
            reading: How files are read.
            view: How pictures are cropped, in their centre.
            flips: Whether mirrored pictures are asked for, too.
            missing: Largest share of the samples that may have no latents.

        Raises:
            CacheError: When the cache is not finished, is of another encoder, of other crops or
                other samples, or stores what a decoder cannot be taught from.
        """
        dataset = LatentDataset(self.path, sample="raw", normalize="none", expect=model)
        self._check_stored(dataset, model, flips)
        self._check_pixels(dataset, reading, view)
        rows = self._rows(dataset, source)
        absent = np.flatnonzero(rows < 0)
        if len(absent) > missing * len(source):
            example, there = source.id(int(absent[0])), dataset.ids[:1]
            raise CacheError(
                f"data.latents {str(self.path)!r} has no latents of {len(absent):,} of the "
                f"{len(source):,} images to train on (such as {example!r}; it has {there[0]!r}): "
                "make it of the same data.path, or bring it up to date with first-stage cache "
                "--update true"
            )
        contents = pq.read_table(self.path / INDEX, columns=["content"])["content"]
        known = contents.take(pa.array(np.maximum(rows, 0))).to_numpy(zero_copy_only=False)
        return Paired(dataset, rows, known.astype("S32"))

    def _check_stored(self, dataset: LatentDataset, model: Any, flips: bool) -> None:
        # Reading latents needs no diffusers, whose import takes seconds in every worker.
        from first_stage.models.bottlenecks import Gaussian
        from first_stage.models.first_stage import as_first_stage

        stored = dataset.manifest.representation
        if isinstance(as_first_stage(model).bottleneck, Gaussian) and stored != "moments":
            raise CacheError(
                f"data.latents {str(self.path)!r} stores the {stored} of each posterior, without "
                "the variance to draw from anew: make it with --representation moments"
            )
        if flips and not dataset.manifest.store["flip"]:
            raise CacheError(
                f"data.latents {str(self.path)!r} has no latents of mirrored images (a mirrored "
                "latent is not one): set data.flip to none, or make the cache with --flip true"
            )

    def _check_pixels(self, dataset: LatentDataset, reading: Reading, view: View) -> None:
        there = dataset.manifest.preprocessing
        buckets = None if view.shape is None else [list(view.shape)]
        here = describe_preprocessing(reading, view.resolution, view.resize, buckets)
        if buckets is not None:  # which resolution and resize do not matter for
            here |= {name: there.get(name) for name in ("resolution", "resize")}
        different = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
        if different:
            words = ", ".join(
                f"{k}: cache {there.get(k)!r}, now {here.get(k)!r}" for k in different
            )
            raise CacheError(
                f"data.latents {str(self.path)!r} was made of other pixels ({words}): set data.* "
                "as the cache has it, or make the cache anew"
            )

    @staticmethod
    def _rows(dataset: LatentDataset, source: Source) -> np.ndarray:
        """Each sample's row in the cache, `(len(source),)`; -1 where there is none."""
        kind = pa.large_string()
        wanted = pa.array((source.id(index) for index in range(len(source))), kind)
        there = dataset.column("id").cast(kind).combine_chunks()
        return pc.index_in(wanted, there).fill_null(-1).to_numpy().astype(np.int64)


class Paired:
    """The latents of a source's samples.

    Args:
        dataset: The cache.
        rows: `(N,)`, each sample's row in it; -1 where there is none.
        contents: `(N,)`, hash of what was encoded.
    """

    def __init__(self, dataset: LatentDataset, rows: np.ndarray, contents: np.ndarray):
        self.dataset, self.rows, self.contents = dataset, rows, contents

    def of(self, index: int, image: Encoded, flipped: bool) -> Tensor:
        """What the encoder gave for a sample; see `first_stage.data.paired.PairedLatents`."""
        row = int(self.rows[index])
        if row < 0:
            raise BrokenImage(_NOT_THERE)
        if content_hash(image).encode() != self.contents[index]:
            raise BrokenImage(_CHANGED)
        stored = self.dataset.stored(row, flipped)
        return stored.long() if self.dataset.manifest.holds_tokens else stored
