"""A unit from its encoded chunks to its shard and its commit.

Chunks are packed into the stored type as they come, so that of a whole unit only what will be
written is held.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from first_stage.files import sha256, write_atomic, write_json
from first_stage.metrics.moments import ChannelMoments
from latent_tools.format.files import write_bytes
from latent_tools.format.plan import Shape
from latent_tools.format.shards import (
    ERRORS,
    LABEL_COLUMNS,
    SHARDS,
    Dtype,
    TokenDtype,
    commit_path,
    pack,
    shard_name,
    unpack,
)

_SUMMED = 1 << 20
"""Values that are summed at once."""


@dataclass
class SampleRecord:
    """What is known of one encoded sample beside its latents.

    Attributes:
        id: The source's id.
        content: Hash of the encoded file's bytes.
        original_size: (height, width) of the picture as it is seen, EXIF orientation applied.
        crop: Top and left of the crop, in pixels of the resized picture.
        columns: The carried columns as JSON values.
    """

    id: str
    content: str
    original_size: tuple[int, int]
    crop: tuple[int, int]
    columns: dict[str, Any]


@dataclass
class EncodedChunk:
    """Some samples of one unit, encoded.

    Attributes:
        unit: The unit's number.
        shape: (height, width) of the pixels.
        name: `moments`, `latents` or `tokens`.
        latents: Of the images, and of the flipped ones when asked for: `(N, K, h, w)` float32 each,
            in the order of `records`; empty when every sample failed.
        records: The encoded samples.
        failures: Id and reason of the others.
        retried: Ids that were not finite at first and were encoded again in float32.
        exact: `(n, K, h, w)`, the first n samples encoded in float32, where the encoder's precision
            is less; `None` elsewhere.
        is_last: Whether it is the unit's last chunk.
        batch_size: Samples per forward pass.
    """

    unit: int
    shape: Shape
    name: str
    latents: list[Tensor]
    records: list[SampleRecord]
    failures: list[tuple[str, str]]
    retried: list[str] = field(default_factory=list)
    exact: Tensor | None = None
    is_last: bool = False
    batch_size: int = 0


class Deviation:
    """Largest and root-mean-square difference, apart for means and log-variances.

    Args:
        channels: Latent channels C; channels behind them are log-variances.
    """

    def __init__(self, channels: int):
        self._channels = channels
        self._samples = 0
        self._largest = [0.0, 0.0]
        self._squares = [0.0, 0.0]
        self._counts = [0, 0]

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take in samples `(N, K, h, w)`."""
        self._samples += len(one)
        for part, values in enumerate((one - other).split(self._channels, dim=1)):
            least, most = values.aminmax()
            self._largest[part] = max(self._largest[part], -float(least), float(most))
            self._squares[part] += float(values.square().sum(dtype=torch.float64))
            self._counts[part] += values.numel()

    def to_json(self, name: str) -> dict[str, dict[str, float]]:
        """`name`, and with log-variances `name_logvar`: samples, max and rms."""
        return {
            key: {
                "samples": self._samples,
                "max": self._largest[part],
                "rms": (self._squares[part] / self._counts[part]) ** 0.5,
            }
            for part, key in enumerate((name, f"{name}_logvar"))
            if self._counts[part]
        }


class OpenUnit:
    """A unit that chunks are added to.

    Args:
        number: Its number.
        dtype: What latents are stored as.
        channels: Latent channels C; 1 for tokens, of which no statistics are kept.
    """

    def __init__(self, number: int, dtype: Dtype | TokenDtype, channels: int):
        self.number, self.dtype, self.channels = number, dtype, channels
        self.sums = _Sums(channels)
        self.storage, self.precision = Deviation(channels), Deviation(channels)
        self.tensors: dict[str, list[Tensor]] = {}
        self.records: list[SampleRecord] = []
        self.failures: list[tuple[str, str]] = []
        self.retried: list[str] = []
        self.last: EncodedChunk | None = None

    def add(self, chunk: EncodedChunk) -> None:
        """Pack a chunk's latents and sum their statistics."""
        self.records += chunk.records
        self.failures += chunk.failures
        self.retried += chunk.retried
        self.last = chunk
        for number, latents in enumerate(chunk.latents if chunk.records else []):
            name = chunk.name + ("_flip" if number else "")
            packed = pack(latents, self.dtype, name)
            for key, tensor in packed.items():
                self.tensors.setdefault(key, []).append(tensor)
            if number == 0 and name != "tokens":
                scales = (packed.get(f"{name}_{part}") for part in ("scale", "offset"))
                kept = unpack(packed[name], *scales)
                self.storage.add(latents, kept)
                self.sums.add(kept)
        if chunk.exact is not None and chunk.records:
            self.precision.add(chunk.latents[0][: len(chunk.exact)], chunk.exact)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the shard, then the commit; both atomic, in this order.

        Equal units give equal bytes, which is why everything beside the tensors goes into ONE
        metadata entry: safetensors keeps metadata in a hash map and writes its entries in no fixed
        order.

        Args:
            folder: The cache.

        Returns:
            The commit.
        """
        assert self.last is not None  # a unit has at least one chunk
        shape = self.last.shape
        commit: dict[str, Any] = {
            "unit": self.number,
            "height": shape[0],
            "width": shape[1],
            "shard": None,
            "count": len(self.records),
            "ids": [r.id for r in self.records],
            "content": [r.content for r in self.records],
            "original_size": [list(r.original_size) for r in self.records],
            "crop": [list(r.crop) for r in self.records],
            "columns": _columns(self.records),
            "failures": [{"id": name, "reason": reason} for name, reason in self.failures],
            "retried_in_float32": self.retried,
            "batch_size": self.last.batch_size,
            "sums": self.sums.moments().to_json(),
            **self.storage.to_json("storage_error"),
            **self.precision.to_json("precision_error"),
        }
        if self.records:
            commit |= self._write_shard(folder / SHARDS / shard_name(self.number, shape), commit)
        write_json(commit_path(folder, self.number), commit, indent=None)
        return commit

    def _write_shard(self, path: Path, commit: dict[str, Any]) -> dict[str, Any]:
        tensors = {}
        for name in list(self.tensors):
            tensors[name] = torch.cat(self.tensors.pop(name))
        labels = _labels(self.records)
        if labels is not None:
            tensors["labels"] = labels
        about = json.dumps({"unit": self.number, "ids": commit["ids"]}, ensure_ascii=False)
        written: dict[str, Any] = {"shard": path.name}

        def write(temporary: Path) -> None:
            safetensors.torch.save_file(tensors, temporary, {"latent_cache": about})
            written.update(sha256=sha256(temporary), bytes=temporary.stat().st_size)

        write_atomic(path, write)
        return written


def _columns(records: list[SampleRecord]) -> dict[str, list[Any]]:
    names = sorted({name for record in records for name in record.columns})
    return {name: [record.columns.get(name) for record in records] for name in names}


def _labels(records: list[SampleRecord]) -> Tensor | None:
    for name in LABEL_COLUMNS:
        values = [record.columns.get(name) for record in records]
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return torch.tensor(values, dtype=torch.int64)
    return None


def trimmed(folder: Path, commit: dict[str, Any], keep: set[str]) -> str | None:
    """Write a unit anew with some of its samples: what is stored of them stays bit for bit.

    The shard gets another name, so that the old one is whole until the commit names the new one.

    Args:
        folder: The cache.
        commit: The unit's commit.
        keep: Ids of the samples and failures to keep.

    Returns:
        The shard's name now, `None` when no sample is left.
    """
    rows = [row for row, name in enumerate(commit["ids"]) if name in keep]
    new = {
        **commit,
        "count": len(rows),
        **{key: [commit[key][row] for row in rows]
           for key in ("ids", "content", "original_size", "crop")},
        "columns": {k: [values[row] for row in rows] for k, values in commit["columns"].items()},
        "failures": [failure for failure in commit["failures"] if failure["id"] in keep],
        "retried_in_float32": [name for name in commit["retried_in_float32"] if name in keep],
        **_errors_of(commit, rows),
    }  # fmt: skip
    for name in ERRORS:
        if name in new and not new[name].get("samples", 1):
            del new[name]
    if rows and len(rows) < commit["count"]:
        new |= _trimmed_shard(folder, commit, rows)
    elif not rows:
        channels = len(commit["sums"]["mean"])
        empty = ChannelMoments(channels).to_json()
        new |= {"shard": None, "sums": empty}
        new = {key: value for key, value in new.items() if key not in ("sha256", "bytes")}
    write_json(commit_path(folder, commit["unit"]), new, indent=None)
    return new["shard"]


def _errors_of(commit: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The errors of a unit's first samples, counted for those of them that are left.

    What they are is kept: the exact latents, against which they were measured, are not.
    """
    errors = {name: commit[name] for name in ERRORS if "samples" in commit.get(name, {})}
    return {
        name: {**error, "samples": sum(row < error["samples"] for row in rows)}
        for name, error in errors.items()
    }


def _trimmed_shard(folder: Path, commit: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    with safetensors.safe_open(folder / SHARDS / commit["shard"], framework="pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name)[rows].contiguous() for name in names}
    ids = [commit["ids"][row] for row in rows]
    about = json.dumps({"unit": commit["unit"], "ids": ids}, ensure_ascii=False)
    content = safetensors.torch.save(tensors, {"latent_cache": about})
    stem, _, number = commit["shard"].removesuffix(".safetensors").partition(".")
    name = f"{stem}.{int(number or 0) + 1}.safetensors"
    write_bytes(folder / SHARDS / name, content)
    channels = len(commit["sums"]["mean"])
    sums = ChannelMoments(channels)
    if "tokens" not in tensors:
        sums = _moments_of(tensors, "moments" if "moments" in tensors else "latents", channels)
    return {
        "shard": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "sums": sums.to_json(),
    }


def _moments_of(tensors: dict[str, Tensor], name: str, channels: int) -> ChannelMoments:
    scale, offset = (tensors.get(f"{name}_{part}") for part in ("scale", "offset"))
    sums = _Sums(channels)
    sums.add(unpack(tensors[name], scale, offset))
    return sums.moments()


class _Sums:
    """Sums of each sample, merged at the end: however samples are cut into chunks, the same.

    Each sample's are taken along its own values only, by numpy, whose order of summing does not
    depend on how many samples there are, nor on threads.

    Args:
        channels: Latent channels C; channels behind them are log-variances.
    """

    def __init__(self, channels: int):
        self._channels, self._count = channels, 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, kept: Tensor) -> None:
        """Take in samples `(N, K, h, w)`."""
        # A chunk's latents in float64 need not be small.
        for part in kept.split(max(1, _SUMMED // max(1, kept[0].numel())) if len(kept) else 1):
            values = part.numpy().reshape(len(part), part.shape[1], -1).astype(np.float64)
            means, logvars = values[:, : self._channels], values[:, self._channels :]
            centers = means.mean(2)
            squares = np.square(means - centers[:, :, None]).sum(2)
            noise = np.exp(logvars).sum(2) if logvars.size else np.zeros_like(squares)
            self._parts.append((centers, squares, noise))
            self._count = means.shape[2]

    def moments(self) -> ChannelMoments:
        """Of all samples."""
        if not self._parts:
            return ChannelMoments(self._channels)
        means, squares, noise = (np.concatenate(rows) for rows in zip(*self._parts, strict=True))
        return ChannelMoments.of_images(self._count, means, squares, noise)
