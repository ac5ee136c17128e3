"""A cache as a data set of the `datasets` library."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from latent_tools.format.index import Index
from latent_tools.format.manifest import Manifest

_ROWS_AT_ONCE = 512


def array_feature(manifest: Manifest) -> tuple[Any, str]:
    """The kind of a `datasets` column that holds what a cache stores, and its type."""
    import datasets

    stored = manifest.store["dtype"]
    if manifest.holds_tokens:
        return datasets.Array2D, stored
    return datasets.Array3D, "float16" if stored == "float16" else "float32"


def as_datasets(
    manifest: Manifest,
    index: Index,
    chosen: np.ndarray,
    stored: Callable[[np.ndarray, Sequence[bool]], Tensor],
) -> Any:
    """Samples of one bucket; see `LatentDataset.to_datasets`.

    Args:
        manifest: The cache's.
        index: The cache's.
        chosen: `(N,)`, their places in the cache; at least one.
        stored: Gives what is stored of places, each as it is or flipped: `(n, K, h, w)`, or
            `(n, h, w)` of tokens.

    Returns:
        A `datasets.Dataset` of N rows.
    """
    import datasets

    array, dtype = array_feature(manifest)
    names = [manifest.tensor_name]
    if manifest.store["flip"]:
        names.append(f"{names[0]}_flip")
    shape = tuple(stored(chosen[:1], [False]).shape[1:])
    pair = datasets.Sequence(datasets.Value("int64"), 2)
    features = datasets.Features(
        {name: array(shape, dtype) for name in names}
        | {"id": datasets.Value("string"), "original_size": pair, "crop": pair}
        | dict(datasets.Features.from_arrow_schema(index.schema))
    )
    parts = []
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        rows = chosen[start : start + _ROWS_AT_ONCE]
        table: dict[str, Any] = {
            name: stored(rows, [name.endswith("_flip")] * len(rows)).numpy().astype(dtype)
            for name in names
        }
        table["id"] = index.values("id", rows)
        sizes = index.sizes(rows).tolist()
        table["original_size"] = [size[:2] for size in sizes]
        table["crop"] = [size[2:] for size in sizes]
        table |= {name: index.values(name, rows) for name in index.schema.names}
        parts.append(datasets.Dataset.from_dict(table, features=features))
    return datasets.concatenate_datasets(parts)
