"""Samples as a batch, whatever columns they carry."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack what can be stacked, and keep the rest as lists.

    torch's own collate function fails on a caption that is missing (`None`) and takes lists of
    captions apart. Give this one to a `DataLoader` as `collate_fn`.

    Args:
        samples: Of a `LatentDataset`, all of one shape; see `BucketBatchSampler`.

    Returns:
        For each key a tensor `(B, ...)` where all values are tensors of one shape or numbers of
        one kind; else the list of values.
    """
    return {key: _stacked([sample[key] for sample in samples]) for key in samples[0]}


def _stacked(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if all(isinstance(v, Tensor) and v.shape == first.shape for v in values):
            return torch.stack(values)
        return values
    for kind in (bool, int, float):
        if all(type(value) is kind for value in values):
            return torch.tensor(values)
    return values
