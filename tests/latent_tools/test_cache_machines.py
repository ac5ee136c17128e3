"""Directories that lag behind, disks that fail for a moment, locks: nothing is lost or twice."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors
from cache_helpers import NumberReader, cache, make_vae, options, photo, shard_hashes, write_photos

from first_stage import files
from first_stage.data import Reading, decode, open_source
from first_stage.errors import UserError
from first_stage.files import MachineError
from latent_tools import CacheError, LatentDataset, LatentStream, Manifest, Process, precompute
from latent_tools import maintenance as tools
from latent_tools.build import launch
from latent_tools.build.encode import ChunkEncoder
from latent_tools.build.prepare import source_ids
from latent_tools.build.sizes import image_sizes
from latent_tools.format.files import LaunchLock
from latent_tools.format.plan import Plan, committed_units
from latent_tools.format.shards import commit_path, read_commit

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def made(tmp_path) -> Path:
    """A finished cache of three units and its data."""
    write_photos(tmp_path / "data", 10)
    cache(tmp_path / "data", tmp_path / "c", NumberReader(), unit_size=4)
    return tmp_path


def in_another_process(work, *arguments):
    """What a function returns, or says it cannot, in a forked process."""
    answers = FORK.Queue()

    def run():
        try:
            answers.put(("done", work(*arguments)))
        except UserError as error:
            answers.put(("refused", str(error)))

    child = FORK.Process(target=run)
    child.start()
    answer = answers.get(timeout=600)
    child.join(600)
    return answer


class TestGc:
    def test_the_lock_is_held_to_the_last_deletion(self, made, monkeypatch):
        for number in (8, 9):
            (made / "c" / "shards" / f"b16x16-u00000{number}.safetensors").write_bytes(b"x")
        said = []

        def unlink(self, missing_ok=False):
            said.append(in_another_process(_take, made / "c"))
            os.unlink(self)

        monkeypatch.setattr(Path, "unlink", unlink)
        assert len(tools.leftovers(made / "c", delete=True)) == 2
        monkeypatch.undo()
        assert [kind for kind, _ in said] == ["refused", "refused"]
        assert in_another_process(_take, made / "c")[0] == "done"

    def test_without_locks_nothing_is_deleted(self, made, monkeypatch):
        stray = made / "c" / "shards" / "b16x16-u000009.safetensors"
        stray.write_bytes(b"x")

        def lockf(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", lockf)
        assert [item.path for item in tools.leftovers(made / "c")] == [stray]
        with pytest.raises(CacheError, match="gives no locks"):
            tools.leftovers(made / "c", delete=True)
        assert stray.exists()

    def test_a_stale_listing_does_not_cost_a_committed_shard(self, made, monkeypatch):
        before = shard_hashes(made / "c")
        monkeypatch.setattr(tools, "committed_units", lambda folder: iter([0, 2]))
        assert tools.leftovers(made / "c", delete=True) == []
        assert shard_hashes(made / "c") == before

    def test_shards_of_an_index_are_kept_for_its_readers(self, made):
        before = shard_hashes(made / "c")
        aside = tools.release(made / "c", 1)
        assert [item.path for item in tools.leftovers(made / "c", delete=True)] == [aside]
        assert shard_hashes(made / "c") == before
        assert len(LatentDataset(made / "c").items(range(10), 0)) == 10
        assert cache(made / "data", made / "c", NumberReader(), unit_size=4).units == 1

    def test_what_has_another_name_is_left_alone(self, made):
        note = made / "c" / "shards" / "read me.txt"
        note.write_text("mine")
        assert tools.leftovers(made / "c", delete=True) == []
        assert note.read_text() == "mine"

    @pytest.mark.parametrize("content", ["{half", '{"unit": 1}', '{"unit": 2, "shard": null}'])
    def test_a_damaged_commit_costs_no_shard(self, made, content):
        before = shard_hashes(made / "c")
        commit_path(made / "c", 1).write_text(content)
        with pytest.raises(CacheError, match=r"u000001\.json"):
            tools.leftovers(made / "c", delete=True)
        assert shard_hashes(made / "c") == before

    def test_behind_links(self, made, tmp_path):
        (made / "c" / "shards").rename(tmp_path / "elsewhere")
        (made / "c" / "shards").symlink_to(tmp_path / "elsewhere")
        shard = tmp_path / "elsewhere" / "b16x16-u000001.safetensors"
        shard.rename(tmp_path / "moved")
        shard.symlink_to(tmp_path / "moved")
        stray = tmp_path / "elsewhere" / "b16x16-u000009.safetensors"
        stray.write_bytes(b"x")
        (tmp_path / "link").symlink_to(made / "c")
        assert len(tools.leftovers(tmp_path / "link", delete=True)) == 1
        assert not stray.exists()
        assert cache(made / "data", tmp_path / "link", NumberReader(), unit_size=4).units == 0
        assert len(LatentDataset(tmp_path / "link").items(range(10), 0)) == 10


def test_a_link_to_nowhere_is_said(tmp_path):
    write_photos(tmp_path / "data", 2)
    (tmp_path / "link").symlink_to(tmp_path / "no disk" / "c")
    with pytest.raises(CacheError, match=r"is a link to .*no disk/c', which is not there"):
        cache(tmp_path / "data", tmp_path / "link", NumberReader())


def _take(folder):
    LaunchLock(folder).take()


class TestErrorsOfTheMachine:
    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch):
        monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))

    def failing(self, monkeypatch, name, times, number=errno.ESTALE):
        original, left = os.open, {"times": times}

        def open_(path, *arguments, **named):
            if str(path).endswith(name) and left["times"] > 0:
                left["times"] -= 1
                raise OSError(number, os.strerror(number))
            return original(path, *arguments, **named)

        monkeypatch.setattr(decode.os, "open", open_)

    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
    def test_a_transient_error_costs_no_sample(self, tmp_path, monkeypatch, number):
        write_photos(tmp_path / "data", 6)
        self.failing(monkeypatch, "00003.png", 2, number)
        outcome = cache(tmp_path / "data", tmp_path / "c", NumberReader())
        assert (outcome.failures, len(LatentDataset(tmp_path / "c"))) == (0, 6)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_lasting_one_ends_the_launch_and_fails_no_sample(
        self, tmp_path, monkeypatch, workers
    ):
        write_photos(tmp_path / "data", 8)
        self.failing(monkeypatch, "00007.png", 99, errno.EIO)
        with pytest.raises(UserError, match=r"00007.png.*start the same command again") as caught:
            cache(tmp_path / "data", tmp_path / "c", NumberReader(), unit_size=4, workers=workers)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        outcome = cache(tmp_path / "data", tmp_path / "c", NumberReader(), unit_size=4)
        assert (outcome.already, outcome.failures) == (1, 0)

    def test_a_file_that_is_gone_is_the_samples_own_error(self, tmp_path, monkeypatch):
        write_photos(tmp_path / "data", 6)
        self.failing(monkeypatch, "00003.png", 99, errno.ENOENT)
        assert cache(tmp_path / "data", tmp_path / "c", max_broken=0.5).failures == 1

    def test_a_size_is_not_guessed_when_the_machine_fails(self, tmp_path, monkeypatch):
        write_photos(tmp_path / "data", 2)
        source = open_source(str(tmp_path / "data"))
        ids = pa.array([source.id(n) for n in range(2)])

        def sizes():
            return image_sizes(tmp_path / "c", source, np.arange(2), ids, 1, Reading(3)).tolist()

        original = open

        def open_(path, *arguments, **named):
            if str(path).endswith("1.png"):
                raise OSError(errno.EIO, "Input/output error")
            return original(path, *arguments, **named)

        monkeypatch.setattr("builtins.open", open_)
        self.failing(monkeypatch, "1.png", 99, errno.EIO)
        with pytest.raises(MachineError, match=r"00001\.png"):
            sizes()
        monkeypatch.undo()
        assert sizes() == [[16, 16], [16, 16]]

    def test_a_size_is_kept_for_the_same_data_read_the_same_way(self, tmp_path):
        for side, name in ((16, "a"), (32, "b")):
            write_photos(tmp_path / name, 2, side=side)
        turned = photo(0, (32, 16))
        exif = turned.getexif()
        exif[0x0112] = 6  # a quarter turn
        turned.save(tmp_path / "a" / "class0" / "00000.png", exif=exif)

        def sizes(name, upright):
            source = open_source(str(tmp_path / name))
            ids, reading = source_ids(source), Reading(3, upright=upright)
            return image_sizes(tmp_path / "c", source, np.arange(2), ids, 1, reading).tolist()

        assert sizes("a", True) == [[32, 16], [16, 16]]
        assert sizes("a", False) == [[16, 32], [16, 16]]
        assert sizes("b", True) == [[32, 32], [32, 32]]
        assert len(list((tmp_path / "c" / "planning").iterdir())) == 3
        assert sizes("a", True) == [[32, 16], [16, 16]]

    def test_a_commit_is_read_again(self, made, monkeypatch):
        original, left = Path.read_text, {"times": 2}

        def read_text(self, *arguments, **named):
            if self.suffix == ".json" and left["times"] > 0:
                left["times"] -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            return original(self, *arguments, **named)

        monkeypatch.setattr(Path, "read_text", read_text)
        assert Manifest.load(made / "c").counts["samples"] == 10

    def once(self, monkeypatch, function, name, number=errno.ESTALE, times=1):
        """A call of `os` that fails for paths that end so, some times."""
        original, left = getattr(os, function), {"times": times}

        def call(path, *arguments, **named):
            if os.fsdecode(path).endswith(name) and left["times"] > 0:
                left["times"] -= 1
                raise OSError(number, os.strerror(number))
            return original(path, *arguments, **named)

        monkeypatch.setattr(os, function, call)
        return left

    @pytest.mark.parametrize(
        ("function", "name"),
        [("scandir", "class1"), ("stat", "class1"), ("stat", "linked.png"), ("stat", "00003.txt")],
    )
    @pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
    def test_neither_a_folder_nor_a_caption_is_lost_to_it(
        self, tmp_path, monkeypatch, function, name, number
    ):
        data = tmp_path / "data"
        write_photos(data, 6)
        (data / "class1" / "00003.txt").write_text("three")
        (data / "class1" / "linked.png").symlink_to(data / "class0" / "00002.png")
        left = self.once(monkeypatch, function, name, number)
        assert cache(data, tmp_path / "c", NumberReader()).failures == 0
        assert left["times"] == 0
        dataset = LatentDataset(tmp_path / "c")
        assert len(dataset) == 7
        assert dataset[dataset.index_of("class1/00003.png")]["caption"] == "three"

    def test_a_folder_that_cannot_be_listed_is_no_empty_folder(self, tmp_path, monkeypatch):
        write_photos(tmp_path / "data", 6)
        self.once(monkeypatch, "scandir", "class1", errno.EIO, times=99)
        with pytest.raises(MachineError, match=r"class1.*cannot be read"):
            open_source(str(tmp_path / "data"))

    def test_a_file_that_cannot_be_read_is_not_taken_for_changed(self, made, monkeypatch):
        """`--update` would drop its latents."""
        before = shard_hashes(made / "c")
        os.utime(made / "data" / "class1" / "00007.png")
        self.failing(monkeypatch, "00007.png", 99, errno.EIO)
        with pytest.raises(MachineError, match=r"00007\.png"):
            cache(made / "data", made / "c", NumberReader(), unit_size=4, update=True)
        assert shard_hashes(made / "c") == before
        monkeypatch.undo()
        monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
        self.failing(monkeypatch, "00007.png", 2, errno.EIO)
        again = cache(made / "data", made / "c", NumberReader(), unit_size=4, update=True)
        assert (again.images, again.already) == (0, 3)

    def test_commits_are_listed_and_asked_for_again(self, made, monkeypatch):
        commit_path(made / "c", 1).unlink()
        original_iterdir, original_stat = Path.iterdir, Path.stat
        failed = []

        def fail_once(what, path):
            if what not in failed:
                failed.append(what)
                raise OSError(errno.ESTALE, "Stale file handle", str(path))

        def iterdir(self):
            if self.name == "commits":
                fail_once("listing", self)
            return original_iterdir(self)

        def stat(self, **named):
            if self.suffix == ".json" and self.parent.name == "commits":
                fail_once("stat", self)
            return original_stat(self, **named)

        monkeypatch.setattr(Path, "iterdir", iterdir)
        monkeypatch.setattr(Path, "stat", stat)
        outcome = cache(made / "data", made / "c", NumberReader(), unit_size=4)
        assert (outcome.already, outcome.is_complete) == (2, True)
        assert sorted(failed) == ["listing", "stat"]

    def test_a_shard_is_opened_again(self, made, monkeypatch):
        original, left = safetensors.safe_open, {"times": 2}

        def safe_open(*arguments, **named):
            if left["times"] > 0:
                left["times"] -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            return original(*arguments, **named)

        monkeypatch.setattr(safetensors, "safe_open", safe_open)
        assert len(list(LatentStream(LatentDataset(made / "c")))) == 10
        assert left["times"] == 0

    def test_a_full_disk_ends_the_launch(self, tmp_path, monkeypatch):
        write_photos(tmp_path / "data", 4)

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("latent_tools.build.unit.write_atomic", full)
        with pytest.raises(OSError, match="No space left on device"):  # told by the command
            cache(tmp_path / "data", tmp_path / "c", NumberReader())


class TestNothingCommitted:
    def fail_once(self, folder, output, **changes):
        class Failing(NumberReader):
            def encode(self, images, return_dict=True):
                if images.shape[-1] == 16:
                    raise RuntimeError("cut off")
                return super().encode(images)

        with pytest.raises(RuntimeError, match="cut off"):
            cache(folder, output, Failing(), **changes)

    @pytest.mark.parametrize(
        "wrong", [{"dtype": "float32"}, {"flip": True}, {"unit_size": 2}, {"resize": 32}]
    )
    def test_the_corrected_options_are_taken(self, tmp_path, wrong):
        write_photos(tmp_path / "data", 6)
        self.fail_once(tmp_path / "data", tmp_path / "c", **{"unit_size": 4, **wrong})
        cache(tmp_path / "data", tmp_path / "c", NumberReader(), unit_size=4)
        cache(tmp_path / "data", tmp_path / "other", NumberReader(), unit_size=4)
        assert shard_hashes(tmp_path / "c") == shard_hashes(tmp_path / "other")
        with pytest.raises(UserError, match="was made differently"):
            cache(tmp_path / "data", tmp_path / "c", make_vae(), unit_size=4)

    def test_without_locks_it_is_said_what_to_delete(self, tmp_path, monkeypatch):
        def lockf(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", lockf)
        write_photos(tmp_path / "data", 6)
        self.fail_once(tmp_path / "data", tmp_path / "c", flip=True)
        with pytest.raises(CacheError, match=r"Nothing is encoded .* delete that folder"):
            cache(tmp_path / "data", tmp_path / "c", NumberReader())
        shutil.rmtree(tmp_path / "c")
        assert cache(tmp_path / "data", tmp_path / "c", NumberReader()).is_complete

    def test_and_so_is_the_corrected_data(self, tmp_path):
        write_photos(tmp_path / "wrong", 3, first=50)
        write_photos(tmp_path / "data", 6)
        self.fail_once(tmp_path / "wrong", tmp_path / "c")
        assert cache(tmp_path / "data", tmp_path / "c", NumberReader()).is_complete
        assert len(LatentDataset(tmp_path / "c")) == 6

    def test_unit_0_alone_is_something(self, made):
        (made / "c" / "manifest.json").unlink()
        for path in (made / "c").iterdir():
            if path.is_file() and path.name != ".lock":
                path.unlink()
        for unit in (1, 2):
            commit_path(made / "c", unit).unlink()
        with pytest.raises(UserError, match="is not empty"):
            cache(made / "data", made / "c", NumberReader())


class TestThePlan:
    def test_a_damaged_plan_has_a_remedy_that_encodes_nothing_again(self, made):
        plan = made / "c" / "plan.parquet"
        before = Plan.load(made / "c").table
        plan.write_bytes(b"PAR1 half a file")
        commit_path(made / "c", 1).unlink()
        with pytest.raises(UserError, match=r"plan\.parquet.*delete that file and start") as caught:
            cache(made / "data", made / "c", NumberReader(), unit_size=4)
        assert "\n" not in str(caught.value)
        plan.unlink()
        outcome = cache(made / "data", made / "c", NumberReader(), unit_size=4)
        assert (outcome.images, outcome.already, outcome.is_complete) == (4, 2, True)
        found = Plan.load(made / "c").table
        assert sorted(found["id"].to_pylist()) == sorted(before["id"].to_pylist())
        assert len(set(LatentDataset(made / "c").ids)) == 10


def test_a_launch_with_nothing_to_do_does_not_finish_again(made, monkeypatch):
    calls = []
    original = launch.finalize
    monkeypatch.setattr(launch, "finalize", lambda *a: calls.append(1) or original(*a))
    assert cache(made / "data", made / "c", NumberReader(), unit_size=4).is_complete
    assert calls == []
    # What was cut off before it was finished, set aside, or lost a file is finished anew.
    for spoil in (
        lambda: (made / "c" / "index.arrow").unlink(),
        lambda: (made / "c" / "index.parquet").write_bytes(b"no"),
        lambda: tools.release(made / "c", 2),
    ):
        spoil()
        calls.clear()
        assert cache(made / "data", made / "c", NumberReader(), unit_size=4).is_complete
        assert calls == [1]
        assert len(LatentDataset(made / "c")) == 10


def test_missing_commits_are_said(tmp_path, monkeypatch):
    """The first of two processes; the other one never comes."""
    monkeypatch.setattr(launch, "_LAG", 0.3)
    write_photos(tmp_path / "data", 16)
    source = open_source(str(tmp_path / "data"))
    with pytest.raises(CacheError, match=r"2 of 4 units .* \(the first is unit 1\).*same command"):
        precompute(NumberReader(), "x", source, tmp_path / "c", options(unit_size=4), Process(0, 2))
    assert not (tmp_path / "c" / "index.parquet").exists()


def handed_over(folder):
    """What the first process of a launch with three units to do hands over."""
    ids = source_ids(open_source(str(folder / "data")))
    return [launch._number_of(ids), launch._number_written(folder / "c"), 0, 1, 2]


def as_second_of_two(folder, numbers):
    source = open_source(str(folder / "data"))
    process = Process(1, 2, hand_over=lambda _: numbers)
    return precompute(NumberReader(), "x", source, folder / "c", options(unit_size=4), process)


class TestTheSecondProcess:
    """Its machine may see the folder as it was, or other data."""

    @pytest.fixture
    def stale(self, made, monkeypatch):
        """What the first process hands over, and its plan; another one, as long, is there."""
        monkeypatch.setattr(launch, "_LAG", 0.3)
        for unit in range(3):
            commit_path(made / "c", unit).unlink()
        numbers, plan = handed_over(made), Plan.load(made / "c")
        ids = plan.table["id"].to_pylist()
        other = Plan.empty().extend(ids[::-1], np.full((10, 2), 16), 4)
        other.save(made / "c")
        return made, numbers, plan

    def test_waits_for_the_plan_that_the_first_one_wrote(self, stale, monkeypatch):
        made, numbers, plan = stale
        monkeypatch.setattr(launch.time, "sleep", lambda _: plan.save(made / "c"))
        assert as_second_of_two(made, numbers).units == 1
        assert read_commit(made / "c", 1)["ids"] == plan.ids(plan.units[1])

    def test_is_refused_where_it_never_comes(self, stale):
        made, numbers, _ = stale
        with pytest.raises(CacheError, match=r"not here what the first process wrote.*one folder"):
            as_second_of_two(made, numbers)
        assert list(committed_units(made / "c")) == []

    def test_is_refused_where_data_are_missing(self, made):
        numbers = handed_over(made)
        (made / "data" / "class1" / "00003.png").unlink()
        with pytest.raises(CacheError, match=r"process 1 sees other samples .*\(9 of them\)"):
            as_second_of_two(made, numbers)


PROCESSES, LAG = 10, 2.0


def _encode_with_lag(data, output, log, rank, barrier, numbers, answers, lost):
    """One of many processes on a directory whose listing lags behind, by rank."""
    original_iterdir, original_start = Path.iterdir, ChunkEncoder.start

    def iterdir(self):
        before = time.time() - LAG * (rank % 3) / 2
        for path in original_iterdir(self):
            if self.name != "commits" or path.stat().st_mtime < before:
                yield path

    def start(self, chunk):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{chunk.unit}\n".encode())
        os.close(handle)
        return original_start(self, chunk)

    Path.iterdir, ChunkEncoder.start = iterdir, start
    launch._LAG = 3.0

    def hand_over(own):
        if rank == 0:
            for _ in range(PROCESSES - 1):
                numbers.put(own)
        result = own if rank == 0 else numbers.get(timeout=600)
        barrier.wait(600)
        return result

    if rank == lost:  # is taken for done with its units, but is not
        launch._share = lambda left, process, in_order: []
    process = Process(rank, PROCESSES, barrier=lambda: barrier.wait(600), hand_over=hand_over)
    try:
        source = open_source(str(data))
        outcome = precompute(
            NumberReader(), "x", source, output, options(unit_size=2, batch_size=2), process
        )
        answers.put((rank, outcome.units, outcome.is_complete, ""))
    except UserError as error:
        answers.put((rank, 0, False, str(error)))


def run_ten(data, output, log, lost=None):
    barrier, numbers, answers = FORK.Barrier(PROCESSES), FORK.Queue(), FORK.Queue()
    children = [
        FORK.Process(
            target=_encode_with_lag,
            args=(data, output, log, rank, barrier, numbers, answers, lost),
        )
        for rank in range(PROCESSES)
    ]
    for child in children:
        child.start()
    found = sorted(answers.get(timeout=600) for _ in children)
    for child in children:
        child.join(600)
    return found


def test_ten_processes_on_a_directory_that_lags_behind(tmp_path):
    """Twelve units are there, seen by some of the processes; each other one is done once."""
    write_photos(tmp_path / "data", 96)
    cache(tmp_path / "data", tmp_path / "c", NumberReader(), unit_size=2, batch_size=2)
    reference = shard_hashes(tmp_path / "c")
    for unit in range(12, 48):
        commit_path(tmp_path / "c", unit).unlink()
    for unit in range(12):
        os.utime(commit_path(tmp_path / "c", unit))
    (tmp_path / "c" / "index.parquet").unlink()

    found = run_ten(tmp_path / "data", tmp_path / "c", tmp_path / "log", lost=4)
    assert found[0][3].startswith("4 of 48 units")  # rank 4's share of 36
    assert "start the same command again" in found[0][3].lower().replace("\n", " ")
    assert not (tmp_path / "c" / "index.parquet").exists()
    assert len(set(committed_units(tmp_path / "c"))) == 44

    found = run_ten(tmp_path / "data", tmp_path / "c", tmp_path / "log")
    assert [complete for _, _, complete, _ in found] == [True] + [False] * 9
    assert sum(units for _, units, _, _ in found) == 4
    encoded = sorted(map(int, (tmp_path / "log").read_text().split()))
    assert encoded == list(range(12, 48))
    assert shard_hashes(tmp_path / "c") == reference
    assert len(LatentDataset(tmp_path / "c")) == 96
