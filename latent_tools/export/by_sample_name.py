"""Formats whose files are named after the samples: MAR and DC-AE (class folders), kohya.

Readers with class folders number the classes by the sorted names of the folders.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from first_stage.data.files import IMAGE_SUFFIXES
from latent_tools.export.cache import ExportCache, relative_path
from latent_tools.export.writer import SmallFiles, npy, npz
from latent_tools.format.files import CacheError

_MARK = "made_by_latent_tools"
"""An array in kohya's files that readers skip: such a file may be written over."""


def class_folders(cache: ExportCache) -> dict[int, str]:
    """The folder of every label.

    The class names where they sort as their labels do, so that the reader's numbers are in the
    labels' order; else the label in five digits.
    """
    assert cache.labels is not None
    labels = cache.labels.tolist()
    if "class" in cache.index.column_names:
        names = dict(zip(labels, cache.index["class"].to_pylist(), strict=True))
        ordered = [names[label] for label in sorted(names)]
        pairs = set(zip(labels, cache.index["class"].to_pylist(), strict=True))
        if (
            len(pairs) == len(names)
            and all(isinstance(n, str) and len(PurePosixPath(n).parts) == 1 for n in ordered)
            and ".." not in ordered
            and "/" not in "".join(ordered)
            and ordered == sorted(set(ordered))
        ):
            return dict(sorted(names.items()))
    return {label: f"{label:05d}" for label in sorted(set(labels))}


class _ClassFolders:
    """Where samples go below class folders; refuses names that two samples would share."""

    def __init__(self, cache: ExportCache, name: Callable[[PurePosixPath], str]):
        assert cache.labels is not None
        self.folders = class_folders(cache)
        self.paths = [
            _below(self.folders[label], relative_path(sample), name)
            for sample, label in zip(cache.ids, cache.labels.tolist(), strict=True)
        ]
        _refuse_duplicates(self.paths, cache.ids)


def _below(folder: str, path: PurePosixPath, name: Callable[[PurePosixPath], str]) -> str:
    parts = path.parts[1:] if len(path.parts) > 1 and path.parts[0] == folder else path.parts
    return str(PurePosixPath(folder, *parts[:-1], name(PurePosixPath(parts[-1]))))


class MarWriter:
    """`<class>/<file>.npz` with `moments` and `moments_flip` [2C, h, w] float32 raw.

    Mean and then LOG-VARIANCE. `<file>` is the image's full name with its extension, as in
    `n01440764_10026.JPEG.npz`.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        self.places = _ClassFolders(cache, lambda file: f"{file.name}.npz")
        self._files = SmallFiles()

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        for place in places.tolist():
            content = npz(
                moments=self.cache.moments(place),
                moments_flip=self.cache.moments(place, flipped=True),
            )
            self._files.put(self.output / self.places.paths[place], content)
        self._files.sync()

    def finish(self) -> None:
        """Nothing is left to do."""


class DcAeWriter:
    """`<class>/<stem>.npy` [C, h, w] float32, scaled."""

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        self.places = _ClassFolders(cache, lambda file: f"{_stem(file)}.npy")
        self._files = SmallFiles()

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        for place in places.tolist():
            latents = self.cache.latents(place) * np.float32(self.cache.scaling_factor)
            self._files.put(self.output / self.places.paths[place], npy(latents))
        self._files.sync()

    def finish(self) -> None:
        """Nothing is left to do."""


class NpyWriter:
    """`<id without its extension>.npy` per image: tokens [h, w] uint16 or uint32; latents [C, h, w]
    float32, raw.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        paths = [relative_path(sample) for sample in cache.ids]
        self.paths = [str(path.with_name(f"{_stem(path)}.npy")) for path in paths]
        _refuse_duplicates(self.paths, cache.ids)
        self._files = SmallFiles()

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        values = self.cache.tokens if self.cache.manifest.holds_tokens else self.cache.latents
        for place in places.tolist():
            self._files.put(self.output / self.paths[place], npy(values(place)))
        self._files.sync()

    def finish(self) -> None:
        """Nothing is left to do."""


class KohyaWriter:
    """`<stem>_{W:04d}x{H:04d}_sd.npz` beside each image, W x H its original size; or `_sdxl`.

    `latents` [C, h, w] float32 raw, `original_size` (W, H), `crop_ltrb`, and `latents_flipped`
    where the cache has flips.

    Args:
        cache: The cache, made from a folder of images.
        output: That folder, or a copy of it.
        kind: `sd` or `sdxl`.

    Raises:
        CacheError: When ids are no image files, two differ only in their extension, or a file of
            somebody else is in the way.
    """

    def __init__(self, cache: ExportCache, output: Path, kind: str):
        self.cache, self.output = cache, output
        self.paths: list[str] = []
        heights = cache.index["original_height"].to_pylist()
        widths = cache.index["original_width"].to_pylist()
        self._sizes = list(zip(widths, heights, strict=True))
        for sample, (width, height) in zip(cache.ids, self._sizes, strict=True):
            path = relative_path(sample)
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise CacheError(
                    f"kohya's scripts look for latents beside image files, and the sample "
                    f"{sample!r} of {str(cache.path)!r} is none: make the cache from a folder of "
                    "images"
                )
            name = f"{path.stem}_{width:04d}x{height:04d}_{kind}.npz"
            self.paths.append(str(path.with_name(name)))
        _refuse_duplicates(self.paths, cache.ids)
        for place in self.paths:
            _refuse_strangers(output / place)
        self._files = SmallFiles()

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        shapes = self.cache.dataset.shapes
        for place in places.tolist():
            height, width = shapes[place].tolist()
            size = self._sizes[place]
            arrays = {
                "latents": self.cache.latents(place),
                "original_size": np.array(size),
                "crop_ltrb": np.array(crop_ltrb((width, height), size)),
                _MARK: np.array(True),
            }
            if self.cache.has_flips:
                arrays["latents_flipped"] = self.cache.latents(place, flipped=True)
            self._files.put(self.output / self.paths[place], npz(**arrays))
        self._files.sync()

    def finish(self) -> None:
        """Nothing is left to do."""


def _refuse_strangers(path: Path) -> None:
    """Refuse to write over latents that something else cached beside an image.

    Raises:
        CacheError: Naming the file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            is_ours = _MARK in arrays
    except FileNotFoundError:
        return
    except (OSError, ValueError, zipfile.BadZipFile):
        is_ours = False
    if not is_ours:
        raise CacheError(
            f"{str(path)!r} is there already and was not written by this export: move it, or "
            "export beside a copy of the images"
        )


def crop_ltrb(bucket: tuple[int, int], image: tuple[int, int]) -> tuple[float, ...]:
    """Left, top, right and bottom as kohya's scripts condition SDXL on them.

    Not the crop itself: the place of the whole image inside the bucket when it is shrunk to fit.
    Latents that the scripts cache themselves carry these numbers, so these must carry them too.

    Args:
        bucket: (width, height) of the encoded pixels.
        image: (width, height) of the image.
    """
    width, height = bucket
    aspect = image[0] / image[1]
    inner = (height * aspect, height) if width / height > aspect else (width, width / aspect)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _stem(file: PurePosixPath) -> str:
    """The name without its extension; a dot in a name that is no image file's stays."""
    return file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name


def _refuse_duplicates(paths: list[str], ids: list[str]) -> None:
    first: dict[str, str] = {}
    for path, sample in zip(paths, ids, strict=True):
        if (other := first.setdefault(path, sample)) is not sample:
            raise CacheError(
                f"the samples {other!r} and {sample!r} would share the file {path!r}: this format "
                "tells files apart by their names alone; rename one of the images"
            )
