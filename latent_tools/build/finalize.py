"""When every unit is committed: the index, the list of failures and the statistics.

Everything is derived from the commits in the order of their units, so finishing twice, or by two
processes at once, writes the same.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from first_stage.metrics.moments import ChannelMoments, merged
from latent_tools.format.files import CacheError, write_bytes
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan
from latent_tools.format.shards import read_commit
from latent_tools.format.statistics import summary

INDEX, FAILURES = "index.parquet", "failures.parquet"


def finalize(folder: Path) -> Manifest:
    """Write `index.parquet`, `failures.parquet`, and counts and statistics into the manifest.

    Args:
        folder: The cache, with every planned unit committed.

    Returns:
        The manifest.

    Raises:
        CacheError: When a commit is missing, or does not hold exactly its unit's planned samples.
    """
    manifest, plan = Manifest.load(folder), Plan.load(folder)
    tables: list[pa.Table] = []
    failures: list[dict[str, Any]] = []
    sums: list[ChannelMoments] = []
    size = 0
    errors: list[tuple[int, dict[str, float]]] = []
    for unit in plan.units:
        commit = read_commit(folder, unit.number)
        failed = [failure["id"] for failure in commit["failures"]]
        if sorted([*commit["ids"], *failed]) != sorted(plan.ids(unit)):
            raise CacheError(
                f"the commit of unit {unit.number} in {str(folder)!r} does not hold exactly the "
                "planned samples: it was damaged or belongs to another cache"
            )
        failures += [{"unit": unit.number, **failure} for failure in commit["failures"]]
        sums.append(ChannelMoments.from_json(commit["sums"]))
        if commit["count"]:
            tables.append(_index_table(commit))
            if "storage_error" in commit:  # tokens are stored as they are
                errors.append((commit["count"], commit["storage_error"]))
            size += commit["bytes"]
    _write_table(folder / INDEX, _concat(tables))
    schema = pa.schema({"id": pa.string(), "reason": pa.string(), "unit": pa.int32()})
    _write_table(folder / FAILURES, pa.Table.from_pylist(failures, schema))
    total = merged(sums, manifest.tensor_channels)
    manifest.statistics = summary(total, manifest.representation == "moments")
    if errors:
        manifest.statistics["storage_error"] = _pooled(errors)
    manifest.counts = {
        "samples": len(plan) - len(failures),
        "failures": len(failures),
        "units": len(plan.units),
        "bytes": size,
    }
    manifest.save(folder)
    return manifest


def _pooled(errors: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Largest and root-mean-square rounding error of stored latents, over all units."""
    samples = sum(count for count, _ in errors)
    mean_square = sum(count * e["rms"] ** 2 for count, e in errors) / samples
    return {"max": max(e["max"] for _, e in errors), "rms": mean_square**0.5}


def _index_table(commit: dict[str, Any]) -> pa.Table:
    count = commit["count"]
    columns: dict[str, Any] = {
        "id": pa.array(commit["ids"], pa.string()),
        "unit": pa.array([commit["unit"]] * count, pa.int32()),
        "row": pa.array(range(count), pa.int32()),
        "shard": pa.array([commit["shard"]] * count, pa.string()),
        "height": pa.array([commit["height"]] * count, pa.int32()),
        "width": pa.array([commit["width"]] * count, pa.int32()),
        "original_height": pa.array([h for h, _ in commit["original_size"]], pa.int32()),
        "original_width": pa.array([w for _, w in commit["original_size"]], pa.int32()),
        "crop_top": pa.array([top for top, _ in commit["crop"]], pa.int32()),
        "crop_left": pa.array([left for _, left in commit["crop"]], pa.int32()),
        "content": pa.array(commit["content"], pa.string()),
    }
    for name, values in commit["columns"].items():
        # A column named like one of the index's own must not hide it.
        columns[name if name not in columns else f"data_{name}"] = _column(values)
    return pa.table(columns)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        # Values of mixed types have no Arrow column: keep them as JSON text.
        return pa.array([json.dumps(value, ensure_ascii=False) for value in values])


def _concat(tables: list[pa.Table]) -> pa.Table:
    if not tables:
        return _index_table(_EMPTY)
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.concat_tables([_as_text(t) for t in tables], promote_options="permissive")


def _as_text(table: pa.Table) -> pa.Table:
    """With the carried columns as JSON text, where units disagree about a column's type."""
    fixed = len(_index_table(_EMPTY).column_names)
    for position in range(fixed, table.num_columns):
        values = [json.dumps(v, ensure_ascii=False) for v in table.column(position).to_pylist()]
        table = table.set_column(position, table.column_names[position], pa.array(values))
    return table


_EMPTY: dict[str, Any] = {
    "count": 0, "ids": [], "unit": 0, "shard": "", "height": 0, "width": 0,
    "original_size": [], "crop": [], "content": [], "columns": {},
}  # fmt: skip


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())
