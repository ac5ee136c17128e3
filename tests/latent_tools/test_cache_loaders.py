"""Under `accelerate`, `StatefulDataLoader`, persistent workers: the right draws, every sample."""

import json
import math
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cache_helpers import NumberReader, cache, draws, eleven_photos, make_vae, photo, write_photos
from prepared_loops import START, loop
from torch.utils.data import DataLoader, default_collate

from first_stage.errors import UserError
from latent_tools import BucketBatchSampler, LatentDataset, LatentStream
from latent_tools.format.shards import ShardReader
from latent_tools.read.epoch import Epoch

stateful = pytest.importorskip("torchdata.stateful_dataloader")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return eleven_photos(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def of_two_shapes(tmp_path_factory) -> Path:
    """A cache of eleven photos, three of them upright."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "data").mkdir()
    for number in range(11):
        size = (16, 32) if number < 3 else (32, 16)
        photo(number, size).save(root / "data" / f"{number:05d}.png")
    cache(root / "data", root / "c", make_vae(), unit_size=4, buckets="16x32,32x16")
    return root / "c"


class TestEpochs:
    def test_a_restart_behind_prepare_draws_the_epoch_that_the_loop_says(self, made):
        read = list(loop(Accelerator(cpu=True), LatentDataset(made, flip=0.0)))
        assert [epoch for epoch, _, _ in read] == [7] * 11 + [8] * 11
        for epoch in (7, 8):
            found = {name: total for at, name, total in read if at == epoch}
            assert found == pytest.approx(draws(made, epoch))

    def test_or_that_the_loader_was_told(self, made):
        dataset = LatentDataset(made, flip=0.0)
        loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=11))
        loader.set_epoch(7)
        (batch,) = loader
        assert batch["latents"][0].sum().item() == pytest.approx(draws(made, 7)[batch["id"][0]])

    def test_a_sampler_tells_it_too(self, made):
        dataset = LatentDataset(made, flip=0.0)
        sampler = BucketBatchSampler(dataset, 5)
        loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch_sampler=sampler))
        sampler.set_epoch(7)
        for batch in loader:
            found = dict(zip(batch["id"], batch["latents"].sum((1, 2, 3)).tolist(), strict=True))
            assert found == pytest.approx({name: draws(made, 7)[name] for name in found})

    @pytest.mark.parametrize("skipped", [0, 2])
    def test_on_one_process_batches_that_are_not_full_are_read(self, of_two_shapes, skipped):
        dataset, accelerator = LatentDataset(of_two_shapes, flip=0.0), Accelerator(cpu=True)
        sampler = BucketBatchSampler(dataset, 2)
        loader = accelerator.prepare(DataLoader(dataset, batch_sampler=sampler))
        sampler.set_epoch(7)
        expected = [[dataset.ids[row] for row in batch] for batch in sampler]
        loader = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        assert [batch["id"] for batch in loader] == expected[skipped:]

    def test_told_once_a_loaders_count_goes_on_from_there(self):
        epoch = Epoch()
        epoch.count(0)
        epoch.count(1)
        assert epoch.number == 1  # told by nobody: the loader's count
        epoch.tell(7)
        assert epoch.number == 7
        epoch.count(2)
        assert epoch.number == 7
        epoch.count(3)
        assert epoch.number == 8
        epoch.restore(3)
        assert epoch.number == 8


@pytest.fixture(scope="module")
def two(made, of_two_shapes, tmp_path_factory) -> list[dict]:
    """What each of two processes read."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("prepared_loops.py")
    line = (made, of_two_shapes, folder / "rank")
    launching.run(2, script, *line, output=folder / "log")
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"] for one in found] == [2, 2]
    return found


class TestTwoProcesses:
    def test_the_loop_draws_epoch_7_on_both(self, two, made):
        for epoch in (START, START + 1):
            expected = draws(made, epoch)
            seen = [entry for one in two for entry in one["loop"] if entry[0] == epoch]
            assert {name for _, name, _ in seen} == set(expected)
            for _, name, total in seen:
                assert total == pytest.approx(expected[name], rel=1e-5)

    def test_a_divided_stream_makes_equally_many_steps_and_shares_nothing(self, two):
        first, second = (one["steps"] for one in two)
        assert len(first) == len(second) == 5
        assert not set(first) & set(second)

    @pytest.mark.parametrize("dispatch", ["true", "false"])
    def test_an_undivided_stream_behind_prepare_is_read_whole(self, two, dispatch):
        assert {number for one in two for number in one["whole"][dispatch]} == set(range(11))

    def test_dividing_twice_is_refused(self, two):
        for rank, one in enumerate(two):
            for said in one["refused"]:
                assert f"the share of process {rank} of 2" in said
                assert "a part would never be read" in said

    def test_a_stateful_loader_goes_on_within_the_epoch_that_is_told(self, two, made):
        seen = [tuple(pair) for one in two for pair in one["resumed"]]
        expected = {int(name[-9:-4]): total for name, total in draws(made, START).items()}
        assert len(seen) == 8  # four full batches, two for each process
        assert len(dict(seen)) == 8
        for number, total in seen:
            assert total == pytest.approx(expected[number], rel=1e-5)

    def test_an_epoch_that_is_told_after_a_worker_has_drawn_is_refused(self, two):
        for one in two:
            assert f"the epoch was set to {START} when a worker had already" in one["late"]
            assert "call set_epoch before it" in one["late"]

    def test_states_of_one_process_that_reads_for_two_are_refused(self, two):
        for one in two:
            for said in one["dispatched"]:
                assert "set use_stateful_dataloader=False" in said

    def test_batches_of_two_shapes_are_not_joined(self, two):
        for one in two:
            assert "set dispatch_batches=False" in one["joined"]


class TestShares:
    @pytest.mark.parametrize("world", [1, 2, 3, 5])
    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_they_are_even_and_disjoint(self, made, world, workers, drop_last):
        dataset = LatentDataset(made)
        shares = []
        for rank in range(world):
            stream = LatentStream(dataset, rank=rank, world=world, drop_last=drop_last, mix=2)
            shares.append([
                row for worker in range(workers)
                for rows in stream._rows(3, 0, worker, workers) for row in rows
            ])  # fmt: skip
        whole = 11 // world if drop_last else math.ceil(11 / world)
        assert [len(share) for share in shares] == [whole] * world
        seen = [row for share in shares for row in share]
        if drop_last:
            assert len(set(seen)) == len(seen)
        else:
            assert set(seen) == set(range(11))


def read(loader, batches=None):
    found = []
    for number, batch in enumerate(loader):
        if batches is not None and number == batches:
            break
        found += list(zip(batch["id"], batch["latents"].sum((1, 2, 3)).tolist(), strict=True))
    return found


@pytest.mark.parametrize("persistent", [False, True])
def test_a_first_epoch_that_nobody_sets_may_be_followed_by_others(made, persistent):
    dataset = LatentDataset(made, flip=0.0)
    loader = DataLoader(dataset, 2, num_workers=1, persistent_workers=persistent)
    assert dict(read(loader)) == pytest.approx(draws(made, 0))
    for epoch in (1, 2, 7):
        dataset.set_epoch(epoch)
        assert dict(read(loader)) == pytest.approx(draws(made, epoch))


class TestStatefulDataLoader:
    def loader(self, made, workers, persistent=False):
        stream = LatentStream(LatentDataset(made, flip=0.0), mix=2)
        return stream, stateful.StatefulDataLoader(
            stream, batch_size=2, num_workers=workers, persistent_workers=persistent
        )

    @pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
    @pytest.mark.parametrize("taken", [0, 1, 3, 5, 6])
    @pytest.mark.parametrize("is_told", [True, False])
    def test_within_an_epoch_it_goes_on(self, made, workers, persistent, taken, is_told):
        stream, loader = self.loader(made, workers, persistent)
        stream.set_epoch(3)
        expected = read(loader)
        assert len(expected) == 11
        stream, loader = self.loader(made, workers, persistent)
        stream.set_epoch(3)
        iterator = iter(loader)
        first = read(next(iterator) for _ in range(taken))
        state = loader.state_dict()
        stream, loader = self.loader(made, workers, persistent)
        loader.load_state_dict(state)
        if is_told:
            stream.set_epoch(3)
        assert first + read(loader) == expected
        if is_told or taken < 6:
            stream.set_epoch(4)
        again = read(loader)
        assert len(again) == 11
        assert dict(again) == pytest.approx(draws(made, 4))

    @pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
    @pytest.mark.parametrize("is_told", [True, False])
    def test_a_state_of_an_epochs_end_begins_the_next(self, made, workers, persistent, is_told):
        stream, loader = self.loader(made, workers, persistent)
        stream.set_epoch(3)
        assert len(read(loader)) == 11
        state = loader.state_dict()
        stream, loader = self.loader(made, workers, persistent)
        loader.load_state_dict(state)
        if is_told:
            stream.set_epoch(4)
        found = read(loader)
        assert len(found) == 11
        assert dict(found) == pytest.approx(draws(made, 4))

    def test_an_epoch_that_is_told_after_workers_have_begun_is_refused(self, made, monkeypatch):
        monkeypatch.setattr("latent_tools.read.stream._TOGETHER", 1)
        began, stream = torch.multiprocessing.Event(), LatentStream(LatentDataset(made))
        loader = stateful.StatefulDataLoader(
            stream, 2, num_workers=1, collate_fn=lambda items: began.set() or default_collate(items)
        )
        loader.state_dict()  # starts the worker, which reads ahead
        assert began.wait(60)
        stream.set_epoch(3)
        with pytest.raises(UserError, match="the epoch was set to 3 when a worker had already"):
            read(loader)

    def test_another_number_of_workers_is_refused(self, made):
        stream = LatentStream(LatentDataset(made))
        next(iter(stream))
        other = LatentStream(LatentDataset(made), world=2)
        other.load_state_dict(stream.state_dict())
        with pytest.raises(UserError, match=r"1 readers .* now there are 2"):
            next(iter(other))

    @pytest.mark.parametrize("changed", [{"seed": 5}, {"mix": 3}, {"shuffle": False}])
    def test_another_order_is_refused(self, made, changed):
        stream = LatentStream(LatentDataset(made), mix=2)
        next(iter(stream))
        other = LatentStream(LatentDataset(made), **{"mix": 2, **changed})
        with pytest.raises(UserError, match=rf"\({next(iter(changed))} was \d+ and is \d+\)"):
            other.load_state_dict(stream.state_dict())

    def test_a_cache_that_has_grown_is_refused_within_an_epoch(self, made, of_two_shapes):
        stream = LatentStream(LatentDataset(made))
        next(iter(stream))
        grown = LatentStream(LatentDataset(of_two_shapes), shape=(32, 16))
        with pytest.raises(UserError, match=r"samples was 11 and is 3, shards was 3 and is 1"):
            grown.load_state_dict(stream.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_off_epoch_costs_the_next_one_nothing(made, workers):
    stream = LatentStream(LatentDataset(made, flip=0.0))
    loader = DataLoader(stream, 2, num_workers=workers, persistent_workers=workers > 0)
    stream.set_epoch(0)
    read(loader, batches=2)
    stream.set_epoch(1)
    found = read(loader)
    assert len(found) == 11
    assert dict(found) == pytest.approx(draws(made, 1))


class TestClassFolders:
    """A hundred classes, of which each shard holds one."""

    @pytest.fixture(scope="class")
    def classes(self, tmp_path_factory) -> LatentDataset:
        root = tmp_path_factory.mktemp("classes")
        write_photos(root / "data", 1, side=4)
        cache(root / "data", root / "c", NumberReader(), resolution=4, resize=4)
        dataset = LatentDataset(root / "c")
        # The order is a matter of the unit table alone.
        table = dataset.unit_table
        dataset._index.units = type(table)(
            np.arange(100), np.arange(101) * 1024, np.full((100, 2), 4), table.shards * 100
        )
        return dataset

    def rows(self, classes, world, workers=1):
        """Each reader's places in its order."""
        return [
            np.array([row for part in LatentStream(classes, rank=rank, world=world)._rows(
                0, 0, worker, workers) for row in part])
            for rank in range(world) for worker in range(workers)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("readers", "least", "most_opens"), [(1, 88, 1), (8, 87, 8), (64, 24, 17)]
    )
    def test_a_batch_has_many_of_them_and_a_shard_is_opened_by_few(
        self, classes, readers, least, most_opens
    ):
        found = self.rows(classes, readers)
        assert np.array_equal(np.sort(np.concatenate(found)), np.arange(102_400))
        batches = [
            len(set((rows[n : n + 256] // 1024).tolist()))
            for rows in found for n in range(0, len(rows) - 255, 256)
        ]  # fmt: skip
        # Of a shuffled whole a batch has 92.4 of 100 on average. A batch of one of 64 readers has
        # at most as many classes as the reader opens shards; it takes 64 samples of each.
        assert np.mean(batches) > least
        opens = np.bincount([shard for rows in found for shard in set((rows // 1024).tolist())])
        assert opens.max() <= most_opens
        assert opens.sum() <= max(100 * readers / 64 * 17, 100 * min(readers, 8))

    def test_a_step_of_eight_processes_has_nearly_all_of_them(self, classes):
        """Each gives a batch of 32 of one of its eight workers."""
        found = self.rows(classes, 8, 8)
        steps = [
            len({row // 1024 for rows in found[worker::8] for row in rows[at : at + 32]})
            for worker in range(8) for at in range(0, 1600, 32)
        ]  # fmt: skip
        assert np.mean(steps) > 88

    def test_the_last_shards_of_a_stretch_are_mixed_like_the_first(self, classes):
        """Of 100 shards at 32 at a time the last four would be a group of their own."""
        rows = np.concatenate(list(LatentStream(classes, mix=32)._rows(0, 0, 0, 1)))
        assert np.array_equal(np.sort(rows), np.arange(102_400))
        found = [len(set((rows[n : n + 256] // 1024).tolist())) for n in range(0, 102_400, 256)]
        assert np.min(found) >= 22

    @pytest.mark.parametrize("taken", [0, 1, 63, 700, 1599, 1600])
    def test_readers_that_share_go_on_where_they_stopped(self, classes, taken):
        for rank in (0, 17, 63):
            stream = LatentStream(classes, rank=rank, world=64)
            whole, rest = (
                [row for part in stream._rows(5, n, 0, 1) for row in part] for n in (0, taken)
            )
            assert len(whole) == 1600
            assert rest == whole[taken:]

    @pytest.mark.parametrize(("readers", "window"), [(1, 7880), (8, 6400), (64, 1600)])
    def test_neighbours_are_read_together(self, classes, readers, window):
        for rows in self.rows(classes, readers):
            runs = 1 + int((np.diff(np.sort(rows[:window])) > 1).sum())
            assert runs <= window / 8 + 1


def test_a_shard_is_opened_once_by_a_reader(made, monkeypatch):
    opened = []
    original = ShardReader._shard

    def shard(self, name):
        if name not in self._open:
            opened.append(name)
        return original(self, name)

    monkeypatch.setattr(ShardReader, "_shard", shard)
    assert sum(1 for _ in LatentStream(LatentDataset(made))) == 11
    assert len(opened) == len(set(opened)) == 3


def test_a_stream_takes_no_memory_of_the_number_of_samples(made):
    stream = LatentStream(LatentDataset(made))
    held = [v for v in vars(stream).values() if isinstance(v, np.ndarray | torch.Tensor)]
    assert all(len(v) == 3 for v in held)  # a number for each unit
