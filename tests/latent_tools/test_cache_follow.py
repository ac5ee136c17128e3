"""A cache that follows its data: what changed is noticed, and the rest stays as it is."""

import json
import os
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_helpers import NumberReader, cache, number_of, numbered, options, run_tool
from conftest import picture
from data_folders import png

from first_stage.data import open_source
from first_stage.errors import UserError
from latent_tools import LatentDataset, precompute
from latent_tools.build import finalize, follow, prepare
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan
from latent_tools.format.shards import read_commit
from latent_tools.maintenance import changed_samples


@pytest.fixture
def data(tmp_path):
    """22 numbered pictures in two classes, with captions; long ago."""
    for number in range(22):
        put(tmp_path / "data", number)
    age(tmp_path / "data")
    return tmp_path / "data"


def name_of(number: int) -> str:
    return f"{'cats' if number % 2 else 'dogs'}/{number:03d}.png"


def put(folder, number: int, shows: int | None = None) -> None:
    path = folder / name_of(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered(number if shows is None else shows).save(path)
    path.with_suffix(".txt").write_text(f"picture {number}")


def age(folder, seconds: float = 5000.0) -> None:
    """As if everything had been there for long; a change time cannot be set, so clocks are."""
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


@pytest.fixture(autouse=True)
def _only_written_times(monkeypatch):
    """Tests set times of writing; the times of change, which they cannot set, would hide them."""
    from first_stage.data import folder

    monkeypatch.setattr(folder, "_touched", lambda path: os.stat(path).st_mtime
                        if os.path.exists(path) else 0.0)  # fmt: skip


def made(data, output, said=None, **changes):
    source = open_source(str(data))
    wanted = options(**{"resolution": 8, "resize": 8, "unit_size": 5, "dtype": "float32",
                        "representation": "mean", **changes})  # fmt: skip
    return precompute(
        NumberReader(), "test", source, output, wanted, say=([] if said is None else said).append
    )


def shown(output) -> dict[str, int]:
    """What each cached latent shows."""
    dataset = LatentDataset(output, normalize="none", flip=0.0)
    return {name: number_of(dataset.stored(index))[0] for index, name in enumerate(dataset.ids)}


def test_changed_gone_and_repaired_are_said_and_taken_in(data, tmp_path, monkeypatch):
    (data / name_of(4)).write_bytes(b"not yet a picture")
    age(data)
    output = tmp_path / "c"
    made(data, output, max_broken=0.5)
    before = shard_bytes(output)
    put(data, 4)  # repaired
    put(data, 7, shows=700)  # another picture under the same name
    (data / name_of(10)).unlink()
    (data / name_of(11)).with_suffix(".txt").write_text("another caption")
    put(data, 90)  # new
    with pytest.raises(UserError, match=r"2 changed, 1 gone, 1 repaired .* --update") as refused:
        made(data, output, max_broken=0.5)
    assert "\n" not in str(refused.value)
    assert shard_bytes(output) == before

    encoded: list[str] = []
    monkeypatch.setattr(
        follow_reader(), "read", counted(follow_reader().read, encoded), raising=True
    )
    said: list[str] = []
    made(data, output, said, update=True, max_broken=0.5)
    assert "2 changed, 1 gone, 1 repaired since the last launch" in said
    # Nothing is encoded but what is new, changed or repaired.
    assert sorted(encoded) == sorted(name_of(n) for n in (4, 7, 11, 90))
    expected = {name_of(n): 700 if n == 7 else n for n in [*range(22), 90] if n != 10}
    assert shown(output) == expected
    dataset = LatentDataset(output)
    captions = {n: dataset[i]["caption"] for i, n in enumerate(dataset.ids)}
    assert captions[name_of(11)] == "another caption"
    assert captions[name_of(12)] == "picture 12"
    # Units that were not concerned are the same files.
    after = shard_bytes(output)
    assert any(before[name] == content for name, content in after.items() if name in before)
    assert run_tool("verify", output, "--data").returncode == 0
    said.clear()
    made(data, output, said, max_broken=0.5)
    assert said == []


def follow_reader():
    from latent_tools.build.images import ChunkReader

    return ChunkReader


def counted(original, encoded):
    def read(self, name, place, shape):
        encoded.append(name)
        return original(self, name, place, shape)

    return read


def shard_bytes(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "shards").iterdir()}


def test_statistics_are_those_of_a_cache_made_anew(data, tmp_path):
    made(data, tmp_path / "c")
    put(data, 3, shows=33)
    (data / name_of(8)).unlink()
    made(data, tmp_path / "c", update=True)
    made(data, tmp_path / "fresh")
    one, other = (Manifest.load(tmp_path / name).statistics for name in ("c", "fresh"))
    for key in ("mean", "std"):
        np.testing.assert_allclose(one[key], other[key], rtol=1e-9)
    assert one["images"] == other["images"] == 21


def test_a_kill_at_any_moment_of_an_update_loses_nothing(data, tmp_path, monkeypatch):
    made(data, tmp_path / "c")
    put(data, 3, shows=33)
    for number in (0, 2, 4, 6, 8):  # a whole unit is gone
        (data / name_of(number)).unlink()
    expected = {name_of(n): 33 if n == 3 else n for n in range(22) if n not in (0, 2, 4, 6, 8)}
    moments = 0
    while True:
        output = tmp_path / f"c{moments}"
        shutil.copytree(tmp_path / "c", output)
        left = [moments]

        def killed(original, left=left):
            def call(*arguments, **more):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return original(*arguments, **more)

            return call

        with monkeypatch.context() as patched:
            for module, name in (
                ("latent_tools.build.unit", "write_bytes"),
                ("latent_tools.build.unit", "write_json"),
                ("latent_tools.format.plan", "write_bytes"),
                ("pathlib.Path", "unlink"),
            ):
                if module == "pathlib.Path":
                    import pathlib

                    patched.setattr(pathlib.Path, name, killed(pathlib.Path.unlink))
                else:
                    owner = __import__(module, fromlist=[name])
                    patched.setattr(owner, name, killed(getattr(owner, name)))
            try:
                made(data, output, update=True)
                finished = True
            except KeyboardInterrupt:
                finished = False
        made(data, output, update=True)
        assert shown(output) == expected, moments
        assert run_damages(output) == []
        if finished:
            break
        moments += 1
    assert moments > 5


def run_damages(output) -> list:
    from latent_tools.maintenance import damages

    return [damage for damage in damages(output) if damage is not None]


def test_shards_deleted_by_hand_are_noticed(data, tmp_path):
    made(data, tmp_path / "c")
    before = shard_bytes(tmp_path / "c")
    victim = sorted((tmp_path / "c" / "shards").iterdir())[1]
    victim.unlink()
    said: list[str] = []
    made(data, tmp_path / "c", said)
    assert "1 units have lost their shards: they are encoded again" in said
    assert shard_bytes(tmp_path / "c") == before


def test_labels_stay_when_classes_come_in_between(data, tmp_path):
    made(data, tmp_path / "c")
    (data / "bears").mkdir()
    numbered(50).save(data / "bears" / "050.png")
    made(data, tmp_path / "c")
    dataset = LatentDataset(tmp_path / "c")
    pairs = {(dataset[i]["class"], int(dataset[i]["label"])) for i in range(len(dataset))}
    assert pairs == {("cats", 0), ("dogs", 1), ("bears", 2)}
    # Of a cache that does not say its classes, they are read from what is encoded.
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    del manifest["source"]["classes"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    (data / "ants").mkdir()
    numbered(51).save(data / "ants" / "051.png")
    made(data, tmp_path / "c")
    dataset = LatentDataset(tmp_path / "c")
    pairs = {(dataset[i]["class"], int(dataset[i]["label"])) for i in range(len(dataset))}
    assert pairs == {("cats", 0), ("dogs", 1), ("bears", 2), ("ants", 3)}


def test_what_only_grew_or_only_lost_is_not_refused(data, tmp_path):
    made(data, tmp_path / "c")
    put(data, 60)
    (data / name_of(5)).unlink()
    said: list[str] = []
    made(data, tmp_path / "c", said)
    assert any("1 gone since the last launch; --update takes that in" in line for line in said)
    assert len(shown(tmp_path / "c")) == 23


def test_files_that_were_not_touched_are_not_read(data, tmp_path, monkeypatch):
    made(data, tmp_path / "c")
    commits = tmp_path / "c" / "commits"
    source = open_source(str(data))
    plan, ids = Plan.load(tmp_path / "c"), source.ids()
    assert follow.notice(tmp_path / "c", plan, source, ids).looked_into == 0
    os.utime(data / name_of(3))  # touched, and the same
    changes = follow.notice(tmp_path / "c", plan, source, ids)
    assert (changes.looked_into, changes.ids) == (1, [])
    made(data, tmp_path / "c")  # which remembers that it looked
    assert commits.exists()
    assert follow.notice(tmp_path / "c", plan, source, ids).looked_into == 0
    assert list(changed_samples(tmp_path / "c", str(data))) == []


def test_a_row_inserted_into_a_parquet_file(tmp_path):
    def write(seeds) -> None:
        values = [{"bytes": png(seed), "path": None} for seed in seeds]
        pq.write_table(pa.table({"image": values}), tmp_path / "d" / "a.parquet")

    (tmp_path / "d").mkdir()
    write(range(6))
    cache(tmp_path / "d", tmp_path / "c")
    write([0, 1, 99, 2, 3, 4, 5])
    with pytest.raises(UserError, match="4 changed of the 6 samples"):
        cache(tmp_path / "d", tmp_path / "c")
    cache(tmp_path / "d", tmp_path / "c", update=True)
    cache(tmp_path / "d", tmp_path / "fresh")
    one, other = (LatentDataset(tmp_path / n, normalize="none") for n in ("c", "fresh"))
    assert sorted(one.ids) == sorted(other.ids)
    for name in one.ids:
        a, b = (s.stored(s.index_of(name)) for s in (one, other))
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_another_data_set_is_refused(tmp_path):
    for folder, seed in (("a", 0), ("b", 100)):
        (tmp_path / folder).mkdir()
        for number in range(3):
            picture(seed + number, 16, 16).save(tmp_path / folder / f"{folder}{number}.png")
    cache(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="it is another data set"):
        cache(tmp_path / "b", tmp_path / "c")


def test_a_launch_with_nothing_to_do_reads_only_the_commits_of_touched_samples(
    data, tmp_path, monkeypatch
):
    made(data, tmp_path / "c")
    read: list[int] = []

    def counted(folder, unit):
        read.append(unit)
        return read_commit(folder, unit)

    for module in (follow, prepare, finalize):
        monkeypatch.setattr(module, "read_commit", counted)
    made(data, tmp_path / "c")
    assert read  # what was touched while it was being encoded is compared once
    read.clear()
    made(data, tmp_path / "c")
    assert read == []
    plan = Plan.load(tmp_path / "c")
    (unit,) = (unit for unit in plan.units if name_of(7) in plan.ids(unit))
    os.utime(data / name_of(7))
    made(data, tmp_path / "c")
    assert read == [unit.number]
    read.clear()
    (tmp_path / "c" / "commits" / f"u{unit.number:06d}.json").unlink()
    assert made(data, tmp_path / "c").units == 1
    assert read  # once more, all


def test_what_a_trimmed_unit_counts_of_its_errors(data, tmp_path):
    made(data, tmp_path / "c", dtype="float16", precision="bf16")
    plan = Plan.load(tmp_path / "c")
    first = plan.ids(plan.units[0])
    before = read_commit(tmp_path / "c", 0)
    assert before["precision_error"]["samples"] == 2
    assert before["storage_error"]["samples"] == 5
    for name in (first[0], first[4]):
        (data / name).unlink()
    made(data, tmp_path / "c", update=True, dtype="float16", precision="bf16")
    after = read_commit(tmp_path / "c", 0)
    assert after["precision_error"] == {**before["precision_error"], "samples": 1}
    assert after["storage_error"] == {**before["storage_error"], "samples": 3}
    (data / first[1]).unlink()
    made(data, tmp_path / "c", update=True, dtype="float16", precision="bf16")
    assert "precision_error" not in read_commit(tmp_path / "c", 0)
