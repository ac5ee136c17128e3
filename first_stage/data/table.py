"""A table of `datasets` as a source: hub data sets, saved ones, and parquet files."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from first_stage.data.columns import encoded_image, find_image_column
from first_stage.data.sample import Sample
from first_stage.errors import DataError


class DatasetSource:
    """A `datasets.Dataset` with an image column, whose files are left encoded until needed.

    Args:
        dataset: The data set.
        name: Its path or hub id, for messages.
        image_column: The column with the images; found by type and name when `None`.
        roots: Folders that paths in rows may lead into.
        files: For parquet files, each one's path, what ids call it, and its rows.

    Raises:
        DataError: When the column is not there or does not hold images.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str | None = None,
        roots: Sequence[str] = (),
        files: Sequence[tuple[str, str, int]] = (),
    ):
        if len(dataset) == 0:
            raise DataError(f"data.path {name!r} holds no samples")
        self.image_column = find_image_column(dataset.features, name, image_column)
        # As Arrow, nothing is decoded: not the images, and no other column of images either.
        self.dataset = dataset.with_format("arrow")
        self.name, self.roots = name, tuple(roots)
        self._classes = {
            column: feature.names
            for column, feature in dataset.features.items()
            if hasattr(feature, "names") and hasattr(feature, "int2str")
        }
        names = [c for c in dataset.column_names if c not in (self.image_column, "__url__")]
        if "label" in self._classes and "class" not in names:
            names.append("class")
        self.columns: tuple[str, ...] = tuple(names)
        self._files = [file for _, file, _ in files]
        self._places = [place for place, _, _ in files]
        self._starts = np.cumsum([0, *(rows for *_, rows in files)])

    def __len__(self) -> int:
        return len(self.dataset)

    def id(self, index: int) -> str:
        """The file and the row's number in it, or the row's number."""
        if not self._files:
            return f"{index:09d}"
        file = self._file(index)
        return f"{self._files[file]}#{index - int(self._starts[file]):09d}"

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def touched(self, index: int) -> float | None:
        """When the row's file was last changed; `None` where rows are in no file of their own."""
        if not self._files:
            return None
        facts = os.stat(self._places[self._file(index)])
        return max(facts.st_mtime, facts.st_ctime)

    columns_touched = touched

    def files(self) -> list[tuple[str, str]]:
        """Each parquet file's path and what ids call it; empty for other tables."""
        return list(zip(self._places, self._files, strict=True))

    def image_sizes(self, places: np.ndarray) -> np.ndarray | None:
        """Bytes of these rows' encoded images; -1 where the row has none in it; `None` where nobody
        knows."""
        column = self.dataset.data.column(self.image_column)
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if self.dataset._indices is not None or not _is_binary(column.type):
            return None
        return pc.fill_null(pc.binary_length(column), -1).to_numpy()[places]

    def read(self, index: int) -> Sample:
        """The row's encoded image and its other columns."""
        table = self.dataset[index : index + 1]
        image = encoded_image(table[self.image_column].combine_chunks()[0], self.roots)
        others = [name for name in table.column_names if name in self.columns]
        row = table.select(others).to_pylist()[0]
        if "class" in self.columns and "class" not in row:
            label = row.get("label")
            is_known = isinstance(label, int) and 0 <= label < len(self._classes["label"])
            row["class"] = self._classes["label"][label] if is_known else None
        return Sample(self.id(index), image, row)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
