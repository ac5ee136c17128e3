"""One unit on disk: a safetensors shard, and the commit whose presence makes the unit done.

A shard holds N samples that could be encoded, in the plan's order:

- `moments` `(N, 2C, h, w)`, the posterior's mean and then its log-variance (natural logarithm,
  clamped to [-30, 20]), or `latents` `(N, C, h, w)`; raw, as the encoder gives them;
- or `tokens` `(N, h, w)`, the numbers of a codebook's codes, uint16 or uint32;
- the same of the flipped pixels as `moments_flip` or `latents_flip`, when asked for;
- `labels` `(N,)` int64, when the data has an integer label;
- for `uint8`, also `..._scale` and `..._offset` `(N, channels)` float32:
  value = offset + scale * stored.

The ids stand in the shard's metadata, so a shard says by itself whose latents it holds.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from first_stage.command_line import command_line
from first_stage.files import write_json
from first_stage.metrics.moments import ChannelMoments
from latent_tools.format.files import CacheError, read_json, write_bytes
from latent_tools.format.plan import Shape

SHARDS, COMMITS = "shards", "commits"
LABEL_COLUMNS = ("label", "labels", "cls")
Dtype = Literal["float16", "bfloat16", "float32", "uint8"]
"""What latents are stored as."""
TokenDtype = Literal["uint16", "uint32"]
"""What tokens are stored as: the smaller one that holds them."""
DTYPES: dict[Dtype | TokenDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
}


def shard_name(unit: int, shape: Shape) -> str:
    """The file name of a unit's shard."""
    return f"b{shape[0]}x{shape[1]}-u{unit:06d}.safetensors"


def commit_path(folder: Path, unit: int) -> Path:
    """The path of a unit's commit."""
    return folder / COMMITS / f"u{unit:06d}.json"


def token_dtype(codes: int) -> TokenDtype:
    """What the numbers of so many codes are stored as."""
    return "uint16" if codes <= 2**16 else "uint32"


def pack(values: Tensor, dtype: Dtype | TokenDtype, name: str) -> dict[str, Tensor]:
    """Latents as they are stored.

    Args:
        values: `(N, K, h, w)` float32.
        dtype: A key of `DTYPES`. `uint8` spreads 256 levels over each sample's and channel's own
            range; `uint16` and `uint32` hold tokens `(N, 1, h, w)` as `(N, h, w)`.
        name: Name of the tensor in the shard.

    Returns:
        The shard's tensors.
    """
    if dtype in ("uint16", "uint32"):
        return {name: values[:, 0].long().to(DTYPES[dtype]).contiguous()}
    if dtype != "uint8":
        return {name: values.to(DTYPES[dtype]).contiguous()}
    low, high = values.amin((2, 3)), values.amax((2, 3))
    scale = torch.where(high > low, (high - low) / 255.0, torch.ones_like(low))
    levels = (values - low[:, :, None, None]) / scale[:, :, None, None]
    stored = levels.round().clamp(0, 255).to(torch.uint8)
    return {name: stored.contiguous(), f"{name}_scale": scale, f"{name}_offset": low}


def unpack(stored: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Stored latents as float32; `scale` and `offset` are those of `uint8`, else `None`.

    Args:
        stored: `(..., K, h, w)`.
        scale: `(..., K)`.
        offset: `(..., K)`.
    """
    values = stored.float()
    if scale is None or offset is None:
        return values
    return values * scale[..., None, None] + offset[..., None, None]


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
class EncodedUnit:
    """A unit ready to be written.

    Attributes:
        unit: Its number.
        shape: (height, width) of the pixels.
        name: `moments` or `latents`.
        latents: `(N, K, h, w)` float32, in the order of `records`; `None` when every sample failed.
        flipped: The same of the flipped pixels, or `None`.
        records: The encoded samples.
        failures: Id and reason of the others.
        retried: Ids that were not finite at first and were encoded again in float32.
        batch_size: Samples per forward pass.
    """

    unit: int
    shape: Shape
    name: str
    latents: Tensor | None
    flipped: Tensor | None
    records: list[SampleRecord]
    failures: list[tuple[str, str]]
    retried: list[str] = field(default_factory=list)
    batch_size: int = 0


def write_unit(
    folder: Path, unit: EncodedUnit, dtype: Dtype | TokenDtype, channels: int
) -> dict[str, Any]:
    """Write a unit's shard, then its commit; both atomic, in this order.

    Equal units give equal bytes, which is why everything beside the tensors goes into ONE metadata
    entry: safetensors keeps metadata in a hash map and writes its entries in no fixed order.

    Args:
        folder: The cache.
        unit: The unit.
        dtype: A key of `DTYPES`.
        channels: Latent channels C; 1 for tokens, of which no statistics are kept.

    Returns:
        The commit.
    """
    commit: dict[str, Any] = {
        "unit": unit.unit,
        "height": unit.shape[0],
        "width": unit.shape[1],
        "shard": None,
        "count": len(unit.records),
        "ids": [r.id for r in unit.records],
        "content": [r.content for r in unit.records],
        "original_size": [list(r.original_size) for r in unit.records],
        "crop": [list(r.crop) for r in unit.records],
        "columns": _columns(unit.records),
        "failures": [{"id": name, "reason": reason} for name, reason in unit.failures],
        "retried_in_float32": unit.retried,
        "batch_size": unit.batch_size,
        "sums": ChannelMoments(channels).to_json(),
    }
    if unit.latents is not None:
        tensors = pack(unit.latents, dtype, unit.name)
        if unit.name != "tokens":
            kept = _unpack_all(tensors, unit.name)
            commit["sums"] = _moments(kept, channels).to_json()
            commit["storage_error"] = _storage_error(unit.latents, kept)
        if unit.flipped is not None:
            tensors |= pack(unit.flipped, dtype, f"{unit.name}_flip")
        labels = _labels(unit.records)
        if labels is not None:
            tensors["labels"] = labels
        about = json.dumps({"unit": unit.unit, "ids": commit["ids"]}, ensure_ascii=False)
        content = safetensors.torch.save(tensors, {"latent_cache": about})
        name = shard_name(unit.unit, unit.shape)
        write_bytes(folder / SHARDS / name, content)
        commit |= {
            "shard": name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    write_json(commit_path(folder, unit.unit), commit, indent=None)
    return commit


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
    }  # fmt: skip
    if rows and len(rows) < commit["count"]:
        new |= _trimmed_shard(folder, commit, rows)
    elif not rows:
        channels = len(commit["sums"]["mean"])
        empty = ChannelMoments(channels).to_json()
        new |= {"shard": None, "sums": empty}
        new = {key: value for key, value in new.items() if key not in ("sha256", "bytes")}
    write_json(commit_path(folder, commit["unit"]), new, indent=None)
    return new["shard"]


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
    main = "moments" if "moments" in tensors else "latents"
    channels = len(commit["sums"]["mean"])
    return {
        "shard": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "sums": _moments(_unpack_all(tensors, main), channels).to_json(),
    }


def read_commit(folder: Path, unit: int) -> dict[str, Any]:
    """A unit's commit.

    Raises:
        CacheError: When it is missing or damaged.
    """
    commit = read_json(commit_path(folder, unit))
    if not isinstance(commit, dict) or commit.get("unit") != unit:
        raise CacheError(f"{str(commit_path(folder, unit))!r} is no commit of unit {unit}")
    return commit


class _OpenShard:
    """A mapped shard and views of its tensors, which take a while to make."""

    def __init__(self, path: Path):
        self.file = safetensors.safe_open(path, framework="pt")
        self._views: dict[tuple[str, int | None], Tensor] = {}

    def view(self, name: str, channels: int | None) -> Tensor:
        """A tensor's first channels, or all: nothing is read before its rows are."""
        key = (name, channels)
        if key not in self._views:
            self._views[key] = self.file.get_tensor(name)[:, :channels]
        return self._views[key]


class ShardReader:
    """Rows of shards through memory maps.

    Maps are opened where they are first needed and never travel to another process.

    Args:
        folder: The cache.
        keep: How many maps stay open.
    """

    def __init__(self, folder: Path, keep: int = 256):
        self.folder, self.keep = folder, keep
        self._open: dict[str, _OpenShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "keep": self.keep, "_open": {}}

    def _shard(self, name: str) -> _OpenShard:
        shard = self._open.pop(name, None)
        if shard is None:
            path = self.folder / SHARDS / name
            try:
                shard = _OpenShard(path)
            except (OSError, safetensors.SafetensorError) as error:
                raise CacheError(
                    f"the shard {str(path)!r} cannot be read ({error}): "
                    f"{command_line('latents', 'verify', self.folder)} says more"
                ) from error
            while len(self._open) >= self.keep:
                self._open.pop(next(iter(self._open)))
        self._open[name] = shard  # last used, last in line
        return shard

    def rows(self, places: Sequence[tuple[str, str, int]], channels: int | None = None) -> Tensor:
        """Samples' tensors as float32.

        Args:
            places: For each sample its shard's file name, the tensor there (`moments`, `latents`
                or their `_flip`) and its row in that; all of one shape.
            channels: How many of the channels, from the first on; `None` takes all.

        Returns:
            `(N, K, h, w)`, float32.
        """
        stored = self._gather(places, channels)
        if stored.dtype is not torch.uint8:
            return unpack(stored, None, None)
        scale, offset = (
            self._gather([(shard, f"{name}_{part}", row) for shard, name, row in places], channels)
            for part in ("scale", "offset")
        )
        return unpack(stored, scale, offset)

    def _gather(self, places: Sequence[tuple[str, str, int]], channels: int | None) -> Tensor:
        views = {
            part: self._shard(part[0]).view(part[1], channels)
            for part in {place[:2] for place in places}
        }
        return torch.stack([views[shard, name][row] for shard, name, row in places])

    def ids(self, shard: str) -> list[str]:
        """The ids that the shard itself names, in the order of its rows."""
        return list(json.loads(self._shard(shard).file.metadata()["latent_cache"])["ids"])


def _columns(records: list[SampleRecord]) -> dict[str, list[Any]]:
    names = sorted({name for record in records for name in record.columns})
    return {name: [record.columns.get(name) for record in records] for name in names}


def _labels(records: list[SampleRecord]) -> Tensor | None:
    for name in LABEL_COLUMNS:
        values = [record.columns.get(name) for record in records]
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return torch.tensor(values, dtype=torch.int64)
    return None


def _unpack_all(tensors: dict[str, Tensor], name: str) -> Tensor:
    return unpack(tensors[name], tensors.get(f"{name}_scale"), tensors.get(f"{name}_offset"))


def _moments(kept: Tensor, channels: int) -> ChannelMoments:
    total = ChannelMoments(channels)
    has_posterior = kept.shape[1] > channels
    for sample in kept.split(1):  # a unit's latents in float64 would not be small
        total.update(sample[:, :channels], sample[:, channels:] if has_posterior else None)
    return total


def _storage_error(values: Tensor, kept: Tensor) -> dict[str, float]:
    difference = (values - kept).double()
    return {"max": float(difference.abs().max()), "rms": float(difference.square().mean().sqrt())}
