"""Formats of a few large files, one a unit: LightningDiT, WebDataset, `datasets`."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import torch

from first_stage.files import write_atomic, write_text
from latent_tools.export.cache import ExportCache
from latent_tools.export.writer import npy
from latent_tools.format.files import CacheError, write_bytes
from latent_tools.read.dataset import array_feature


class LightningDitWriter:
    """`*.safetensors` with `latents`, `latents_flip` [N, C, h, w] float32 raw and `labels` [N].

    These are the native shards' own keys: where the cache stores latents in float32, its shards are
    linked and nothing is copied. `latents_stats.pt` has the mean and standard deviation [1, C, 1,
    1] by which the reader normalises.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        self.is_linked = not cache.has_posterior and cache.manifest.store["dtype"] == "float32"

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        assert self.cache.labels is not None
        path = self.output / f"unit-{unit:06d}.safetensors"
        source = self.cache.shard(int(places[0]))
        if self.is_linked and _has_labels(source):
            write_atomic(path, lambda temporary: _link(source, temporary))
            return
        tensors = {
            name: torch.from_numpy(np.stack([self.cache.latents(p, flipped) for p in places]))
            for name, flipped in (("latents", False), ("latents_flip", True))
        }
        tensors["labels"] = torch.from_numpy(self.cache.labels[places])
        write_bytes(path, safetensors.torch.save(tensors))

    def finish(self) -> None:
        """Write the statistics of the latents that were written."""
        statistics = self.cache.manifest.statistics
        of_means = self.cache.has_posterior and self.cache.draw == "mean"
        std = statistics["mean_std" if of_means else "std"]
        values = {
            name: torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1)
            for name, numbers in (("mean", statistics["mean"]), ("std", std))
        }
        # The reader asks for this file by name and loads it with torch.load.
        stream = io.BytesIO()
        torch.save(values, stream)
        write_bytes(self.output / "latents_stats.pt", stream.getvalue())


def _has_labels(shard: Path) -> bool:
    with safetensors.safe_open(shard, framework="pt") as tensors:
        return "labels" in tensors.keys()  # noqa: SIM118 - it is no dictionary


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        target.symlink_to(source.resolve())


class WebDatasetWriter:
    """`.tar` shards of `{id}.npy` [C, h, w] float16, scaled, and `{id}.json`; of tokens [h, w].

    A reader takes a member's name up to the first dot of its last part for the key, so dots in ids
    are written as `%2E` (and a percent sign as `%25`); the JSON has the id as it is.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        write_atomic(
            self.output / f"unit-{unit:06d}.tar", lambda path: self._write_tar(path, places)
        )

    def _write_tar(self, path: Path, places: np.ndarray) -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for place in places.tolist():
                key = quote(self.cache.ids[place], safe="/#+=@ ").replace(".", "%2E").lstrip("/")
                _add(tar, f"{key}.npy", npy(self._scaled(place)))
                about = json.dumps(self._about(place), ensure_ascii=False, default=str)
                _add(tar, f"{key}.json", about.encode())

    def _scaled(self, place: int) -> np.ndarray:
        if self.cache.manifest.holds_tokens:
            return self.cache.tokens(place)
        scaled = self.cache.latents(place) * np.float32(self.cache.scaling_factor)
        half = scaled.astype(np.float16)
        if not np.isfinite(half).all():
            raise CacheError(
                f"the scaled latents of {self.cache.ids[place]!r} (up to "
                f"{np.abs(scaled).max():.3g}) are outside the range of float16"
            )
        return half

    def _about(self, place: int) -> dict[str, Any]:
        row = self.cache.row(place)
        about = {
            "id": row["id"],
            "width": row["original_width"],
            "height": row["original_height"],
            "latents_of": [row["height"], row["width"]],
            "crop_top_left": [row["crop_top"], row["crop_left"]],
        }
        if self.cache.manifest.holds_tokens:
            about["codes"] = self.cache.manifest.first_stage["codes"]
        else:
            about["scaling_factor"] = self.cache.scaling_factor
        carried = {name: row[name] for name in self.cache.dataset.column_names}
        return about | {name: v for name, v in carried.items() if name not in about}

    def finish(self) -> None:
        """Nothing is left to do."""


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)  # the time of writing stays 0: equal units give equal bytes
    tar.addfile(member, io.BytesIO(content))


class DatasetsWriter:
    """A folder of parquet files that `datasets.load_dataset` reads; a configuration per shape.

    What is stored, raw: `moments` or `latents` (and `..._flip`) as `Array3D`, float16 where the
    cache stores that, or `tokens` as `Array2D`, beside `id`, `original_size` (height, width),
    `crop` (top, left) and the carried columns. Scaling and shift stand in the data card.
    """

    def __init__(self, cache: ExportCache, output: Path):
        self.cache, self.output = cache, output
        self._array, self._dtype = array_feature(cache.manifest)
        self._names = [cache.manifest.tensor_name]
        if cache.has_flips:
            self._names.append(f"{self._names[0]}_flip")

    def write_unit(self, unit: int, places: np.ndarray) -> None:
        """Write a unit; see `Writer`."""
        import datasets

        stored = {
            name: np.stack([self.cache.moments(p, name.endswith("_flip")) for p in places])
            for name in self._names
        }
        rows = [self.cache.row(place) for place in places.tolist()]
        table: dict[str, Any] = {n: values.astype(self._dtype) for n, values in stored.items()}
        table["id"] = [row["id"] for row in rows]
        table["original_size"] = [[r["original_height"], r["original_width"]] for r in rows]
        table["crop"] = [[row["crop_top"], row["crop_left"]] for row in rows]
        table |= {name: [row[name] for row in rows] for name in self.cache.dataset.column_names}
        shape = self.cache.dataset.shapes[places[0]].tolist()
        data = datasets.Dataset.from_dict(table, features=self._features(stored))
        path = self.output / _bucket(shape) / f"unit-{unit:06d}.parquet"
        # Its own `to_parquet` would draw a progress bar a unit; the schema carries the features.
        table_of_unit = data.data.table.replace_schema_metadata(data.features.arrow_schema.metadata)
        write_atomic(path, lambda temporary: pq.write_table(table_of_unit, temporary))

    def _features(self, stored: dict[str, np.ndarray]) -> Any:
        import datasets

        carried = self.cache.index.select(self.cache.dataset.column_names).schema
        pair = datasets.Sequence(datasets.Value("int64"), 2)
        arrays = {n: self._array(v.shape[1:], self._dtype) for n, v in stored.items()}
        return datasets.Features(
            {
                **arrays,
                "id": datasets.Value("string"),
                "original_size": pair,
                "crop": pair,
                **datasets.Features.from_arrow_schema(carried),
            }
        )

    def finish(self) -> None:
        """Write the data card, from which `load_dataset` knows the shapes."""
        buckets = [_bucket(shape) for shape in self.cache.shapes]
        configs = "".join(
            f'- config_name: "{name}"\n  data_files: "{name}/*.parquet"\n' for name in buckets
        )
        stage = self.cache.manifest.first_stage
        if self.cache.manifest.holds_tokens:
            use = (
                f"`tokens` number its {stage['codes']:,} codes (codebook "
                f"{stage['codebook_sha256'][:16]}).\n"
            )
        else:
            use = (
                f"- scaling_factor: {self.cache.scaling_factor!r}\n"
                f"- shift_factor: {self.cache.shift_factor!r}\n\n"
                "A diffusion model trains on `(z - shift_factor) * scaling_factor`. `moments` hold "
                "the posterior's mean and then its log-variance: `z = mean + exp(logvar / 2) * "
                "noise`.\n"
            )
        card = (
            f"---\nconfigs:\n{configs}---\n\nLatents as `{stage['class']}` "
            f"{stage['encoder_sha256'][:16]} gives them (f{stage['downsample_factor']}, "
            f"{stage['latent_channels']} channels), raw.\n\n{use}"
        )
        write_text(self.output / "README.md", card)


def _bucket(shape: Any) -> str:
    return f"{shape[0]}x{shape[1]}"
