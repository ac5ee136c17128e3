"""The index: a column's values straight from the mapped bytes are those that pyarrow gives."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_tools.build.index import write_index
from latent_tools.format import index as index_module
from latent_tools.format.index import INDEX, SAMPLES, Index


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """23 samples in batches of 4 rows, with columns of all kinds."""
    for module in (index_module, __import__("latent_tools.build.index", fromlist=["ROWS"])):
        monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(index_module, "_SHIFT", 2)

    def commit(unit: int, first: int, count: int):
        rows = range(first, first + count)
        return {
            "unit": unit, "height": 8, "width": 8, "shard": f"s{unit}", "count": count,
            "ids": [f"ü{row}" for row in rows], "content": [""] * count,
            "original_size": [[row, row + 1] for row in rows],
            "crop": [[row, -row] for row in rows],
            "columns": {
                "label": [row * 2**40 - 7 for row in rows],
                "caption": ["日本" * (row % 3) for row in rows],
                "empty": ["" for _ in rows],
                "holes": [None if row % 5 == 0 else f"h{row}" for row in rows],
                "score": [row / 3 for row in rows],
                "tags": [["a"] * (row % 4) for row in rows],
            },
            "failures": [],
        }  # fmt: skip

    write_index(tmp_path, lambda add: [add(commit(n, 5 * n, min(5, 23 - 5 * n))) for n in range(5)])
    return tmp_path


@pytest.mark.parametrize("mapped", [True, False])
def test_values_at_any_rows(folder, mapped):
    if not mapped:
        (folder / SAMPLES).unlink()
    index, table = Index(folder), pq.read_table(folder / INDEX)
    assert len(index) == 23
    rows = np.random.default_rng(0).integers(0, 23, 100)
    for name in ("id", "label", "caption", "empty", "holes", "score", "tags"):
        assert index.values(name, rows) == table[name].take(pa.array(rows)).to_pylist()
        assert index.values(name, rows[:0]) == []
    assert index.sizes(rows).tolist() == [[row, row + 1, row, -row] for row in rows]
    assert index.sizes(rows).dtype == np.int64
    assert index.find("ü22") == 22
