"""Streams of shards: every sample once per epoch, on any number of processes, from any step."""

import collections
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pytest
from conftest import arguments
from shards import KINDS, ROWS, TOTAL, write_shards
from shards import folder as folder  # a fixture

from first_stage.config import parse_config
from first_stage.data import shards, start_loader, tar
from first_stage.data.find_shards import find_shards
from first_stage.data.images import View
from first_stage.data.shard_stream import (
    ShardLoader,
    ShardStream,
    StreamOrder,
    StreamSource,
    split_stream,
)
from first_stage.data.shards import ShardedRows, count_rows
from first_stage.data.sources import open_source
from first_stage.data.stream import StepSampler
from first_stage.errors import DataError, UserError
from first_stage.training.loop import train
from first_stage.training.step import Trainer

BATCH = 6


def opened(folder: Path, column=None) -> ShardedRows:
    return ShardedRows(str(folder), count_rows(find_shards(str(folder), "train")), column)


def stream_of(folder: Path, source: StreamSource | None = None, buffer: int = 12) -> ShardStream:
    source = source or StreamSource(opened(folder))
    return ShardStream(source, View(8, None), 3, 0, BATCH, buffer)


def trained_on(folder, world, workers, start, stop, micro=1, **more):
    """Per step: ids, pixels and positions of the whole batch, over processes in their order."""
    steps = collections.defaultdict(list)
    for rank in range(world):
        sampler = StepSampler(BATCH, micro, range(start, stop), rank, world)
        loader = ShardLoader(
            stream_of(folder, **more), sampler, sampler.micro_batches, workers, False
        )
        for number, batch in enumerate(start_loader(loader)):
            step = start + number // sampler.micro_batches
            assert len(batch.ids) == micro
            steps[step] += [
                (name, pixels.numpy().tobytes(), position)
                for name, pixels, position in zip(
                    batch.ids, batch.pixels, batch.positions, strict=True
                )
            ]
    return dict(steps)


def ids_in_order(steps) -> list[str]:
    return [name for step in sorted(steps) for name, _, _ in steps[step]]


EPOCHS = 2
STEPS = -(-EPOCHS * TOTAL // BATCH)  # the last one begins the third epoch


def test_each_sample_exactly_once_per_epoch_on_any_number_of_processes_and_workers(folder):
    expected = trained_on(folder, 1, 0, 0, STEPS)
    ids = ids_in_order(expected)
    everything = sorted(sample.id for sample in opened(folder).read(0, TOTAL))
    assert len(set(everything)) == TOTAL
    for epoch in range(EPOCHS):
        assert sorted(ids[epoch * TOTAL : (epoch + 1) * TOTAL]) == everything
    assert ids[:TOTAL] != ids[TOTAL : 2 * TOTAL]  # each epoch in an order of its own
    for world, workers, micro in [(2, 0, 3), (2, 2, 1), (3, 2, 2), (6, 0, 1)]:
        assert trained_on(folder, world, workers, 0, STEPS, micro) == expected, (world, workers)


def test_resuming_in_mid_epoch_repeats_and_drops_nothing(folder):
    whole = trained_on(folder, 1, 0, 0, STEPS)
    for step in (1, 4, 6, 7):  # before, at and behind the end of the first epoch
        before = trained_on(folder, 2, 0, 0, step)
        after = trained_on(folder, 3, 1, step, STEPS)
        assert before | after == whole


def test_processes_and_workers_read_no_sample_that_another_one_reads(folder):
    steps = TOTAL // BATCH  # within one epoch
    read: dict[int, list[int]] = {}
    original = ShardedRows.read
    for rank in range(3):
        read[rank] = []

        def note(rows, first, last, cursor=-1, rank=rank):
            read[rank] += range(first, last)
            return original(rows, first, last, cursor)

        sampler = StepSampler(BATCH, 2, range(steps), rank, 3)
        with mock.patch.object(ShardedRows, "read", note):
            list(ShardLoader(stream_of(folder), sampler, 1, 0, False))
        assert len(set(read[rank])) == len(read[rank])  # nor the same one twice
    assert not set(read[0]) & set(read[1])
    assert not set(read[0] + read[1]) & set(read[2])
    assert len(set(read[0] + read[1] + read[2])) == steps * BATCH


def test_ids_and_images_are_those_without_streaming(folder):
    plain, rows = open_source(str(folder)), opened(folder)
    streamed = rows.read(0, TOTAL)
    assert [s.id for s in streamed] == [plain.id(i) for i in range(len(plain))]
    assert [s.image for s in streamed] == [plain.read(i).image for i in range(len(plain))]


def test_any_rows_can_be_read_in_any_order(folder):
    rows, everything = opened(folder), opened(folder).read(0, TOTAL)
    draw = np.random.default_rng(0)
    for _ in range(40):
        first = int(draw.integers(TOTAL))
        last = int(draw.integers(first, TOTAL + 1))
        assert rows.read(first, last, cursor=int(draw.integers(3))) == everything[first:last]


def test_held_out_rows_are_never_trained_on(folder):
    rows = opened(folder)
    training, held_out = split_stream(rows, 0.2)
    assert held_out is not None
    assert len(held_out) == TOTAL // 5
    assert len(training) + len(held_out) == TOTAL
    held = {held_out.read(i).id for i in range(len(held_out))}
    kept = {training.read(i).id for i in range(len(training))}
    assert not held & kept
    assert len(held | kept) == TOTAL
    ids = ids_in_order(trained_on(folder, 2, 0, 0, 20, source=training))
    assert sorted(ids[: len(training)]) == sorted(kept)

    assert split_stream(rows, 0)[1] is None
    assert len(split_stream(rows, 1e-6)[1] or []) == 1  # one at least
    with pytest.raises(DataError, match=r"at most 0\.5"):
        split_stream(rows, 0.7)


@pytest.mark.parametrize("slots", [1, 4, 7, 50])
@pytest.mark.parametrize("buffer", [1, 16, 1000])
def test_the_order_visits_everything_once_per_epoch_whatever_the_sizes(slots, buffer):
    starts = np.cumsum([0, 3, 0, 20, 1, 9])
    order = StreamOrder(starts, 5, slots, buffer)
    found = [order.find(position) for position in range(3 * 33)]
    for epoch in range(3):
        part = found[epoch * 33 : (epoch + 1) * 33]
        assert {e for e, _ in part} == {epoch}
        assert sorted(sample for _, sample in part) == list(range(33))
    again = StreamOrder(starts, 5, slots, buffer)
    assert [again.find(position) for position in (98, 3, 40)] == [found[98], found[3], found[40]]


def test_the_buffer_bounds_what_is_held_and_shuffles_within_it():
    order = StreamOrder([0, 1000], 0, 10, 200)
    first_place = [order.find(step * 10)[1] for step in range(100)]
    assert sorted(first_place) == list(range(100))  # place 0 reads the first tenth
    for window in range(5):  # 200 samples over 10 places: 20 at a time
        part = first_place[window * 20 : (window + 1) * 20]
        assert sorted(part) == list(range(window * 20, window * 20 + 20))
        assert part != sorted(part)
    # Places change their windows one after the other, never two at a step.
    changed = collections.Counter(
        step
        for place in range(10)
        for step in range(1, 100)
        if order.window_at(step * 10 + place)[0] != order.window_at(step * 10 - 10 + place)[0]
    )
    assert max(changed.values()) == 1


def test_an_undecodable_sample_is_replaced_alike_on_any_number_of_processes(tmp_path):
    folder = write_shards(tmp_path / "shards", "tar", broken={3, 17})
    expected = trained_on(folder, 1, 0, 0, STEPS)
    assert trained_on(folder, 3, 2, 0, STEPS) == expected
    ids = set(ids_in_order(expected))
    assert not [i for i in ids if "key003" in i or "key017" in i]
    assert len(ids) == TOTAL - 2


def test_counts_are_remembered_until_a_shard_changes(tmp_path):
    folder = write_shards(tmp_path / "shards", "tar")
    urls, memory = find_shards(str(folder), "train"), tmp_path / "memory"
    first = count_rows(urls, memory)
    shards._index.cache_clear()
    with mock.patch.object(tar, "walk", side_effect=AssertionError):
        assert count_rows(urls, memory) == first
        rows = ShardedRows(str(folder), first, None)
        assert len(rows.read(0, TOTAL)) == TOTAL  # from what is remembered, too
    (folder / "shard-000.tar").write_bytes((folder / "shard-004.tar").read_bytes())
    assert [s.rows for s in count_rows(urls, memory)] == [12, *ROWS[1:]]


def test_fingerprints_tell_changes_and_not_places(tmp_path):
    def fingerprint(folder):
        return StreamSource(opened(folder)).fingerprint()

    one = write_shards(tmp_path / "one", "tar")
    other = write_shards(tmp_path / "other", "tar")
    assert fingerprint(one) == fingerprint(other)
    (other / "shard-002.tar").unlink()
    assert fingerprint(one) != fingerprint(other)


def test_what_cannot_be_streamed_is_told_in_words(tmp_path, images):
    with pytest.raises(DataError, match="holds no parquet or WebDataset"):
        find_shards(str(images), "train")
    with pytest.raises(DataError, match="does not exist"):
        find_shards(str(tmp_path / "nothing"), "train")
    folder = write_shards(tmp_path / "shards", "parquet", (3, 3))
    with pytest.raises(DataError, match="has the columns: label, image"):
        opened(folder, "picture")
    rows = opened(folder)
    data = (folder / "shard-001.parquet").read_bytes()
    (folder / "shard-001.parquet").write_bytes(data[:-10])
    with pytest.raises(DataError, match=r"shard-001\.parquet' cannot be read"):
        rows.read(4, 6)
    with pytest.raises(DataError, match=r"shard-001\.parquet' cannot be read"):
        opened(folder)
    write_shards(folder, "parquet", (3, 2))
    with pytest.raises(DataError, match="shorter than when its rows were counted"):
        rows.read(4, 6)


def test_urls_and_hub_data_sets_are_read_through_their_file_systems(tmp_path):
    folder = write_shards(tmp_path / "shards", "parquet", (2, 3))
    for path in (f"file://{folder}", f"file://{folder}/*.parquet"):
        urls = find_shards(path, "train")
        assert [name for _, name in urls] == ["shard-000.parquet", "shard-001.parquet"]
        assert all(url.startswith("file://") for url, _ in urls)
        rows = ShardedRows(path, count_rows(urls), None)
        assert rows.read(0, 5) == opened(folder).read(0, 5)
    files = {"train": [url for url, _ in urls], "test": []}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    with mock.patch.object(datasets, "load_dataset_builder", return_value=builder):
        assert find_shards("someone/pictures", "train") == urls
        with pytest.raises(DataError, match="has the splits: train, test"):
            find_shards("someone/pictures", "other")


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_training_resumes_bit_for_bit_in_mid_epoch(tmp_path, monkeypatch, kind):
    folder = write_shards(tmp_path / "shards", kind, broken={4})
    fields = {
        **{"data.streaming": True, "data.shuffle_buffer": 12, "data.validation_share": 0.1},
        **{"train.max_steps": 8, "train.batch_size": 6, "train.log_every": 3},
    }
    original, seen = Trainer.training_step, collections.Counter()
    stop_at = None

    def training_step(trainer, done, batches):
        seen.update(name for batch in batches for name in batch.ids)
        original(trainer, done, batches)
        if done + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    for name, stop_at in (("whole", None), ("stopped", 3)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        seen.clear()
        outcome = train(parse_config(arguments("run", folder, **fields)))
        if stop_at:
            assert outcome.step == 3
            stop_at = None
            resume = ["--config", "run/config.yaml", "--resume", "latest"]
            outcome = train(parse_config(resume))
        assert outcome.finished
        assert outcome.held_out == 3
        assert sum(seen.values()) == 48
    for file in ("export/diffusion_pytorch_model.safetensors", "log.jsonl", "training.gif"):
        whole, stopped = (tmp_path / name / "run" / file for name in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes()
    assert len(list((tmp_path / "whole" / "run" / "shards").iterdir())) == len(ROWS)


def test_built_in_sets_cannot_be_streamed(tmp_path):
    with pytest.raises(UserError, match=r"data\.streaming"):
        parse_config(arguments(tmp_path, "digits", **{"data.streaming": True}))
