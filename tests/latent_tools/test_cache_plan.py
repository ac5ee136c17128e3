import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from first_stage.data.sources import ListSource
from latent_tools.build.prepare import source_ids
from latent_tools.format.files import CacheError
from latent_tools.format.plan import (
    Plan,
    bucket_shapes,
    duplicate_id,
    nearest_bucket,
    parse_buckets,
)


def empty(tmp_path):
    return Plan.load(tmp_path)


def square(count, side=16):
    return np.full((count, 2), side)


def test_units_hold_every_sample_once_in_order(tmp_path):
    names = [f"s{n}" for n in range(1009)]
    plan = empty(tmp_path).extend(names, square(1009), 64)
    units = plan.units
    assert [len(u) for u in units] == [64] * 15 + [49]
    assert [name for u in units for name in plan.ids(u)] == names
    assert plan.table["row"].to_pylist() == [n % 64 for n in range(1009)]


def test_plan_reads_back(tmp_path):
    plan = empty(tmp_path).extend(["a/ü.png", "b"], square(2), 1)
    plan.save(tmp_path)
    assert Plan.load(tmp_path).table.equals(plan.table)


def test_growth_adds_units_and_changes_none(tmp_path):
    plan = empty(tmp_path).extend(list("bdf"), square(3), 2)
    # The source lists the new ones between the old ones, as a sorted folder does.
    source = pa.array(list("abcdefg"))
    positions = plan.new_ids(source)
    assert positions.tolist() == [0, 2, 4, 6]
    grown = plan.extend(source.take(pa.array(positions)).to_pylist(), square(4), 2)
    assert grown.table.slice(0, 3).equals(plan.table)
    assert [grown.ids(u) for u in grown.units] == [["b", "d"], ["f"], ["a", "c"], ["e", "g"]]
    assert grown.places_in(source).tolist() == [1, 3, 5, 0, 2, 4, 6]
    assert grown.places_in(pa.array(["f", "b"])).tolist() == [1, -1, 0, -1, -1, -1, -1]


def test_a_unit_has_one_shape(tmp_path):
    shapes = np.array([(16, 32), (16, 16), (16, 32), (32, 16), (16, 32)])
    plan = empty(tmp_path).extend(list("abcde"), shapes, 2)
    found = {u.shape: plan.ids(u) for u in plan.units if u.shape != (16, 32)}
    assert found == {(16, 16): ["b"], (32, 16): ["d"]}
    assert [plan.ids(u) for u in plan.units if u.shape == (16, 32)] == [["a", "c"], ["e"]]


def test_duplicate_ids_are_named():
    assert duplicate_id(pa.array(list("abc"))) is None
    assert duplicate_id(pa.array(list("abcb"))) == "b"


def test_auto_buckets_keep_the_area_and_are_multiples():
    shapes = bucket_shapes(512, 64)
    assert (512, 512) in shapes
    assert all(h % 64 == 0 and w % 64 == 0 for h, w in shapes)
    assert all(512 * 512 * 0.7 < h * w <= 512 * 512 for h, w in shapes)
    assert all(max(h, w) <= 2 * min(h, w) for h, w in shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert len(shapes) >= 5


def test_nearest_bucket_by_aspect_ratio():
    buckets = [(16, 32), (24, 24), (32, 16)]
    sizes = np.array([(100, 210), (480, 640), (99, 100), (300, 100), (0, 0)])
    chosen = nearest_bucket(sizes, buckets).tolist()
    assert chosen == [[16, 32], [24, 24], [24, 24], [32, 16], [24, 24]]


@pytest.mark.parametrize("text", ["", "16", "16x", "16x20x3", "axb", "0x16", "-16x16"])
def test_malformed_buckets_are_refused(text):
    with pytest.raises(CacheError, match="buckets has"):
        parse_buckets(text, 64, 8)


def test_buckets_must_fit_the_downsample_factor():
    assert parse_buckets("16x32, 32x16", 64, 8) == [(16, 32), (32, 16)]
    with pytest.raises(CacheError, match=r"12x16, but both sides must be multiples .* 8"):
        parse_buckets("12x16", 64, 8)


def test_ids_have_64_bit_places_and_those_of_older_plans_are_read(tmp_path):
    """With 32 bits, 2 GiB of ids, which 80 million samples have, do not fit into an array."""
    plan = Plan.empty().extend(list("abc"), square(3), 2)
    assert plan.table["id"].type == pa.large_string()
    older = plan.table.set_column(0, "id", plan.table["id"].cast(pa.string()))
    pq.write_table(older, tmp_path / "plan.parquet")
    assert Plan.load(tmp_path).table.equals(plan.table)
    Plan.load(tmp_path).save(tmp_path)
    assert Plan.load(tmp_path).table.equals(plan.table)
    assert source_ids(ListSource("x", [])).type == pa.large_string()
