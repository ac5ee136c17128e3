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

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from first_stage.command_line import command_line
from first_stage.files import patiently
from latent_tools.format.files import CacheError, read_json
from latent_tools.format.plan import Shape

SHARDS, COMMITS = "shards", "commits"
LABEL_COLUMNS = ("label", "labels", "cls")
Dtype = Literal["float16", "bfloat16", "float32", "uint8"]
"""What latents are stored as."""
TokenDtype = Literal["uint16", "uint32"]
"""What tokens are stored as: the smaller one that holds them."""
ERRORS = ("storage_error", "storage_error_logvar", "precision_error", "precision_error_logvar")
"""Of a commit and of the statistics: what rounding to the stored type, and encoding in less than
float32, changed; log-variances apart, whose unit is another."""
_SHARD_NAME = re.compile(r"b\d+x\d+-u(\d+)(\.\d+)?\.safetensors")
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


def unit_of_shard(name: str) -> int | None:
    """The unit of a shard's file name; `None` for another name."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match else None


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


def is_committed(folder: Path, unit: int) -> bool:
    """Whether a unit's commit is there, asked for by its name: a listing may lag behind."""
    path = commit_path(folder, unit)
    return patiently(path.exists, repr(str(path)))


def read_commit(folder: Path, unit: int) -> dict[str, Any]:
    """A unit's commit.

    Raises:
        CacheError: When it is missing or damaged.
    """
    commit = read_json(commit_path(folder, unit))
    if not isinstance(commit, dict) or commit.get("unit") != unit or "shard" not in commit:
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
                shard = patiently(lambda: _OpenShard(path), repr(str(path)))
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
