"""Formats whose files carry running numbers: fast-DiT, EDM2, REPA."""

import hashlib
from pathlib import Path

import numpy as np

from first_stage.files import write_text
from latent_tools.export.cache import ExportCache
from latent_tools.export.writer import SmallFiles, npy


class FastDitWriter:
    """`imagenet256_features/{i}.npy` [1, C, h, w] float32, scaled; `imagenet256_labels/{i}.npy`.

    The reader lists both folders, sorts each as text and pairs them by place, so the numbers are
    padded to one width. It looks for these folder names whatever the data set is.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        self._files = SmallFiles()

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        assert self.cache.labels is not None
        for place in places.tolist():
            latents = self.cache.latents(place)[None] * np.float32(self.cache.scaling_factor)
            label = self.cache.labels[place : place + 1]
            name = f"{place:09d}.npy"
            self._files.put(self.output / "imagenet256_features" / name, npy(latents))
            self._files.put(self.output / "imagenet256_labels" / name, npy(label))
        self._files.sync()

    def finish(self) -> None:
        """Nothing is left to do."""


class Edm2Writer:
    """`{idx:08d}[:5]/img-mean-std-{idx:08d}.npy` [2C, h, w] float32 raw, mean and then STANDARD
    DEVIATION (MAR's files have the log-variance there); `dataset.json` with the labels.

    Args:
        cache: The cache.
        output: The export's folder.
        subfolder: Where in it the files go: REPA reads `vae-sd`.
        by_name: Number the samples in the order of their sorted ids instead of the cache's. REPA
            sorts the names of the pictures and pairs them with these files by place, so that a
            cache that grew must not number new samples behind all others.
    """

    def __init__(
        self, cache: ExportCache, output: Path, subfolder: str = ".", by_name: bool = False
    ):
        self.cache, self.folder = cache, output / subfolder
        self._files = SmallFiles()
        self.order: str | None = None
        self._numbers = list(range(len(cache.ids)))
        if by_name:
            for number, place in enumerate(sorted(self._numbers, key=cache.ids.__getitem__)):
                self._numbers[place] = number
            self.order = hashlib.sha256("\n".join(sorted(cache.ids)).encode()).hexdigest()[:16]

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        for place in places.tolist():
            mean, logvar = np.split(self.cache.moments(place), 2)
            content = npy(np.concatenate([mean, np.exp(np.float32(0.5) * logvar)]))
            self._files.put(self.folder / _edm2_name(self._numbers[place]), content)
        self._files.sync()

    def finish(self) -> None:
        """Write `dataset.json`: names in the order in which the reader sorts them, and labels."""
        assert self.cache.labels is not None
        # A line a sample, so that people can look into it.
        labels = self.cache.labels.tolist()
        numbered = sorted(zip(self._numbers, labels, strict=True))
        lines = (f'["{_edm2_name(number)}", {label}]' for number, label in numbered)
        low, high = self.cache.manifest.preprocessing["pixel_range"]
        head = f'{{"pixel_range": [{low}, {high}],\n"labels": [\n'
        write_text(self.folder / "dataset.json", head + ",\n".join(lines) + "\n]}\n")


def _edm2_name(place: int) -> str:
    number = f"{place:08d}"
    return f"{number[:5]}/img-mean-std-{number}.npy"
