"""What a kill, or another number of processes, does to a cache: nothing."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from cache_helpers import (
    ROOT,
    NumberReader,
    cache,
    encode_logged,
    launch,
    launch_command,
    make_vae,
    shard_hashes,
    tidy_all_the_time,
    write_photos,
)

from first_stage.data import open_source
from latent_tools import LatentDataset, Manifest
from latent_tools.build.unit import OpenUnit
from latent_tools.format.plan import committed_units
from latent_tools.format.shards import commit_path, shard_name, unit_of_shard

# Minutes on two cores; a machine ten times slower must not fail for that.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS, UNITS = 20, 250
LEASHED = Path(__file__).with_name("leashed_launch.py")
LEASH = 10
"""Units after which a run that is to be killed stands still: a fast machine is not done before."""


@pytest.fixture
def context(monkeypatch):
    """Starts runs, all of which are ended with the test."""
    # The server that forks the runs imports everything once; it looks for modules there.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'helpers'}")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["cache_helpers"])
    yield found
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.mark.parametrize("beside_gc", [False, True])
def test_twenty_kills_leave_the_shards_of_an_undisturbed_run(tmp_path, context, beside_gc):
    data, output, log = tmp_path / "data", tmp_path / "c", tmp_path / "log"
    write_photos(data, 8 * UNITS)

    def start(*arguments):
        process = context.Process(target=encode_logged, args=arguments)
        process.start()
        return process

    undisturbed = start(data, tmp_path / "reference", tmp_path / "reference.log")
    undisturbed.join()
    assert undisturbed.exitcode == 0, (tmp_path / "reference.err").read_text()

    gc = context.Process(target=tidy_all_the_time, args=(output, tmp_path / "gc"))
    if beside_gc:
        gc.start()
    moments, again, cut_off = random.Random(7), [], []
    done: set[int] = set()
    progress = []
    for kill in range(KILLS):
        lines = len(_lines(log))
        more, held = moments.randint(1, 6), None
        if kill % 4 == 3:  # in the write of a shard or, when that is there, of its commit
            unit = sorted(set(range(UNITS)) - done)[more]
            shard, commit = shard_name(unit, (16, 16)), commit_path(output, unit).name
            held = commit if kill % 8 == 3 else shard
        process = start(data, output, log, LEASH, held)
        if held is not None:
            _wait((tmp_path / "log.held").exists, process)
            cut_off.append((tmp_path / "log.held").read_text())
        elif kill % 4:
            # Anywhere in the encoding, some units on: counted, since machines differ in speed.
            units = len(done) + more
            _wait(lambda units=units: len(set(committed_units(output))) >= units, process)
            time.sleep(moments.uniform(0, 0.02))
        else:  # in the start, or soon after
            time.sleep(moments.uniform(0, 0.4))
        assert process.is_alive(), (tmp_path / "log.err").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        again += [unit for unit in map(int, _lines(log)[lines:]) if unit in done]
        done = set(committed_units(output)) if output.exists() else set()
        progress.append(len(done))
        if held is not None:
            (tmp_path / "log.held").unlink()
            if beside_gc:  # looks before the next launch may take the lock
                _wait(lambda: cut_off[-1] in _lines(tmp_path / "gc"), gc)
                left = {unit_of_shard(path.name) for path in (output / "shards").iterdir()}
                assert left == done
    assert len(set(progress)) > KILLS // 2, progress  # the kills fell into the encoding
    assert progress[-1] < UNITS
    lines = len(_lines(log))
    last = start(data, output, log)
    last.join()
    assert last.exitcode == 0, (tmp_path / "log.err").read_text()
    if beside_gc:
        assert gc.is_alive()
    again += [unit for unit in map(int, _lines(log)[lines:]) if unit in done]
    assert again == []
    assert {n: h for n, h in shard_hashes(output).items() if not n.startswith(".")} == shard_hashes(
        tmp_path / "reference"
    )
    index = (output / "index.parquet").read_bytes()
    assert index == (tmp_path / "reference" / "index.parquet").read_bytes()
    assert Manifest.load(output).statistics == Manifest.load(tmp_path / "reference").statistics


def _lines(path):
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """1,009 samples, their first stage, and the cache that one process makes of them."""
    root = tmp_path_factory.mktemp("many")
    write_photos(root / "data", 1009)
    make_vae().save_pretrained(root / "vae")
    result = launch(1, *arguments(root, "one"))
    assert result.returncode == 0, result.stderr
    return root


def arguments(root, output):
    return [
        "--first_stage", str(root / "vae"), "--data.path", str(root / "data"),
        "--output", str(root / output), "--unit_size", "16", "--batch_size", "2",
        "--data.workers", "0",
    ]  # fmt: skip


def assert_same(root, output):
    assert shard_hashes(root / output) == shard_hashes(root / "one")
    source = open_source(str(root / "data"))
    there = pq.read_table(root / output / "index.parquet")["id"].to_pylist()
    assert sorted(there) == sorted(source.id(n) for n in range(1009))
    assert there == LatentDataset(root / "one").ids
    statistics = [Manifest.load(root / name).statistics for name in (output, "one")]
    assert statistics[0] == statistics[1]


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_any_number_of_processes_gives_the_same_bytes(many, processes):
    result = launch(processes, *arguments(many, f"by{processes}"))
    assert result.returncode == 0, result.stderr
    assert f"{processes} processes on cpu" in result.stdout
    assert result.stdout.count("samples in") == processes + 1
    assert_same(many, f"by{processes}")


def test_the_number_of_processes_may_change_after_a_kill(many):
    """A launch of three is killed whole; one of two finishes."""
    command, environment = launch_command(3, *arguments(many, "changed"), script=LEASHED)
    killed = subprocess.Popen(
        command, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _wait(lambda: len(set(committed_units(many / "changed"))) >= 5, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    _kill_orphans(many / "changed")
    done = len(set(committed_units(many / "changed")))
    assert 5 <= done < 64
    assert not (many / "changed" / "index.parquet").exists()
    result = launch(2, *arguments(many, "changed"))
    assert result.returncode == 0, result.stderr
    assert f"in {64 - done} of 64 units to encode" in result.stdout
    for path in (many / "changed" / "shards").glob(".tmp-*"):
        path.unlink()  # of the kill; `gc` lists them
    assert_same(many, "changed")


def _wait(condition, process):
    """Wait for something that a process does, as long as it lives."""
    deadline = time.monotonic() + 600
    while not condition():
        is_over = process.poll() is not None if hasattr(process, "poll") else not process.is_alive()
        assert not is_over, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _kill_orphans(output):
    """Processes of the killed launch that run in sessions of their own."""
    for process in psutil.process_iter(["cmdline"]):
        if str(output) in (process.info["cmdline"] or []):
            process.kill()
            process.wait(10)


def test_more_processes_than_samples(many, tmp_path):
    write_photos(tmp_path / "data", 2)
    few = arguments(many, "x")
    few[few.index("--data.path") + 1] = str(tmp_path / "data")
    few[few.index("--output") + 1] = str(tmp_path / "c")
    result = launch(3, *few)
    assert result.returncode == 0, result.stderr
    assert len(LatentDataset(tmp_path / "c")) == 2


def test_memory_stays_flat_over_ten_thousand_samples(tmp_path, monkeypatch):
    write_photos(tmp_path / "data", 10_000, side=32)
    used: list[int] = []
    original = OpenUnit.write

    def write(*arguments):
        used.append(psutil.Process().memory_info().rss)
        return original(*arguments)

    monkeypatch.setattr(OpenUnit, "write", write)
    cache(
        tmp_path / "data", tmp_path / "c", NumberReader(), resolution=32, resize=32, flip=True,
        dtype="float32", unit_size=100, batch_size=50,
    )  # fmt: skip
    assert len(used) == 100
    # Kept latents alone would be 120 MB from the first unit to the last, pixels another 30 MB.
    assert max(used[-10:]) - min(used[10:20]) < 20e6, [n // 1_000_000 for n in used]
    # Two a unit; beside them two folders and eight files.
    assert len(list((tmp_path / "c").rglob("*"))) <= 100 * 2 + 10
