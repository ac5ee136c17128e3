"""Columns of data sets: which one holds the images, and what a value of it is."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from first_stage.data.broken import BrokenImage
from first_stage.data.decode import Encoded
from first_stage.errors import DataError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixels", "picture", "photo")


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that may hold images, of a parquet file's schema."""
    told = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(told).get("info", {}).get("features", {}) if told else {}
    found = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        typed = isinstance(features.get(name), dict) and features[name].get("_type") == "Image"
        encoded = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        named = name in IMAGE_NAMES and not pa.types.is_integer(kind)
        if typed or encoded or named:
            found.append(name)
    return found


def find_image_column(features: Any, name: str, wanted: str | None) -> str:
    """The column that holds images.

    Args:
        features: `datasets.Features` of the data set.
        name: Path or id, for messages.
        wanted: The name asked for, or `None` to find it.

    Returns:
        The column's name: the one asked for, or the only image-typed one, or one named like an
        image.

    Raises:
        DataError: Naming the columns that are there.
    """
    import datasets

    there = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise DataError(
                f"data.image_column is {wanted!r}, but {name!r} has the columns: {there}"
            )
        return wanted
    typed = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [c for c in IMAGE_NAMES if c in features]
    if len(typed) == 1:
        return typed[0]
    for column in named:
        if not typed or column in typed:
            return column
    raise DataError(
        f"{name!r} has no column that is clearly the image (columns: {there}): "
        "set data.image_column to one of them"
    )


def encoded_image(value: Any, roots: Sequence[str] = ()) -> Encoded:
    """What a value of the image column holds; empty bytes where there is none.

    Args:
        value: Bytes, an undecoded `datasets.Image` (bytes or a path), a path, an array as nested
            lists, or an Arrow scalar of any of these.
        roots: Folders that paths may lead into, beside the caches of `datasets`.

    Returns:
        Bytes, a path below one of the folders, an array, or the reason why it cannot be read.
    """
    if isinstance(value, pa.Scalar):
        value = getattr(value, "value", value) if _is_extension(value) else value
        if _is_list(value.type):
            return _array(value)
        value = value.as_py()
    if value is None:
        return b""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path") or b""
    if isinstance(value, str):
        return _confined(value, roots)
    if isinstance(value, list):
        return np.asarray(value)
    return value if isinstance(value, bytes | np.ndarray) else BrokenImage(
        f"a value of type {type(value).__name__} is no image"
    )  # fmt: skip


def _is_extension(value: pa.Scalar) -> bool:
    return isinstance(value.type, pa.BaseExtensionType)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or (
        pa.types.is_fixed_size_list(kind)
    )  # fmt: skip


def _array(scalar: Any) -> np.ndarray | BrokenImage:
    """Nested lists as an array of their values' own type."""
    values = scalar.values
    if values is None:
        return BrokenImage("no value")
    shape = [len(values)]
    while _is_list(values.type):
        inner = values.flatten()
        if not len(values) or len(inner) % len(values):
            return BrokenImage("lists of unequal lengths are no image")
        shape.append(len(inner) // len(values))
        values = inner
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)


def _confined(path: str, roots: Sequence[str]) -> Path | BrokenImage:
    if "://" in path:
        return BrokenImage(f"lies at {path}: only files of the data set are read")
    import datasets

    allowed = [os.path.realpath(root) for root in roots if root]
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
    tried = [os.path.join(root, path) for root in roots] or [path]
    for place in tried:
        real = os.path.realpath(place)
        inside = (*allowed, *(os.path.realpath(cache) for cache in caches))
        if any(real.startswith(folder.rstrip("/") + "/") for folder in inside):
            if place == tried[-1] or os.path.exists(real):
                return Path(real)
            continue
        return BrokenImage(
            f"its file {path} lies outside of the data set's folder, from which nothing is read"
        )
    return BrokenImage(f"its file {path} is not there")
