"""Signals, and the loss of a process: told by name, in time."""

import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from first_stage.distributed import heartbeat as watch
from first_stage.distributed import processes
from first_stage.distributed.heartbeat import Peer, Watch, looked_after_by
from first_stage.distributed.processes import Processes, StopRequest


def test_one_process_needs_no_other():
    alone = Processes(patience=1)
    tensor = torch.tensor([1.0, 2.0])
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert torch.equal(alone.average(tensor), tensor)
    assert alone.stack(tensor).shape == (1, 2)
    assert alone.totals(3, 4) == [3, 4]
    assert alone.gather("x") == ["x"]
    with alone.together():
        alone.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
        signal.raise_signal(number)  # the same request, passed on by a launcher
    assert signal.getsignal(number) == before


def test_a_second_signal_later_acts_at_once(interruptible):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with mock.patch.object(processes, "_SAME_SIGNAL", 0.01):
            time.sleep(0.02)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a shell's background jobs do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Job:
    """Processes of a job, played by threads with one store; some are real, killable children."""

    def __init__(self, places, patience=0.5):
        self.store = dist.HashStore()
        self.peers = [
            Peer(rank, os.getpid(), f"host{place}", f"place{place}")
            for rank, place in enumerate(places)
        ]
        self.patience, self.left = patience, {}

    def watch(self, rank: int) -> Watch:
        made = Watch(self.store, self.peers, rank, self.patience, lambda code: self.leave(rank))
        made._beat_every = 0.1
        return made

    def leave(self, rank: int) -> None:
        self.left[rank] = time.monotonic()


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(watch, "ROLL_CALL", 0.4)
    monkeypatch.setattr(watch, "_LOOK_EVERY", 0.05)


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_process_that_died_here_is_named_and_the_hanging_ones_end(hurry, capsys):
    job = Job([0, 0, 0], patience=1000)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    job.peers[1] = Peer(1, child.pid, "host0", "place0")
    watches = [job.watch(0), job.watch(2)]
    for each in watches:
        each.start()
    time.sleep(0.3)
    assert not job.left
    child.kill()
    child.wait()
    wait_for(lambda: len(job.left) == 2)
    told = capsys.readouterr().err
    assert told.count("error:") == 1  # by the first survivor
    assert f"process 1 (pid {child.pid} on host0) died" in told


def test_a_machine_that_falls_silent_is_named_after_the_patience(hurry, capsys):
    job = Job([0, 1])
    watches = [job.watch(0), job.watch(1)]
    for each in watches:
        each.start()
    time.sleep(0.8)  # longer than the patience: beating machines are not missed
    assert not job.left
    watches[1]._closed.set()  # its threads stop beating without a goodbye
    silent_since = time.monotonic()
    wait_for(lambda: 0 in job.left)
    assert 0.5 < job.left[0] - silent_since < 2.5
    assert f"process 1 (pid {os.getpid()} on host1) died" in capsys.readouterr().err


def test_a_process_that_said_goodbye_is_not_missed(hurry):
    job = Job([0, 1])
    watches = [job.watch(0), job.watch(1)]
    for each in watches:
        each.start()
    watches[1].close()
    time.sleep(1.2)
    assert not job.left
    watches[0].close()


def test_roll_call_names_the_silent_one_or_tells_what_another_said(hurry):
    job = Job([0, 1, 1])
    watches = [job.watch(rank) for rank in range(3)]
    said: dict[int, tuple[str, int]] = {}

    def survive(rank):
        said[rank] = watches[rank].roll_call()

    threads = [threading.Thread(target=survive, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0] == said[2]
    message, told_by = said[0]
    assert message.startswith(f"process 1 (pid {os.getpid()} on host1) died")
    assert told_by == 0

    watches[1].tell("the disk is full")
    message, told_by = watches[2].roll_call()
    assert message == f"process 1 (pid {os.getpid()} on host1) ended: the disk is full"
    assert told_by == 0


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store):
        self.store, self.requests = store, 0

    def __getattr__(self, name):
        def ask(*arguments):
            self.requests += 1
            return getattr(self.store, name)(*arguments)

        return ask


@pytest.mark.parametrize("places", [[0] * 8 + [1] * 8, [0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 2, 0]])
def test_every_process_is_looked_after_by_one_on_another_machine(places):
    peers = [Peer(rank, 1, "h", f"place{place}") for rank, place in enumerate(places)]
    found = [peer.rank for rank in range(len(peers)) for peer in looked_after_by(rank, peers)]
    assert sorted(found) == list(range(len(peers)))
    for rank, peer in enumerate(peers):
        assert all(other.place != peer.place for other in looked_after_by(rank, peers))
    assert looked_after_by(0, peers[:1] * 3) == []


def test_what_a_process_asks_of_the_store_does_not_grow_with_the_job(hurry):
    asked = {}
    for hosts in (2, 8):
        job = Job([rank // 8 for rank in range(8 * hosts)], patience=1000)
        job.store = Counting(job.store)
        watches = [job.watch(rank) for rank in range(8 * hosts)]
        job.store.requests = 0
        for each in watches:
            each.start()
        time.sleep(1.0)
        for each in watches:
            each._closed.set()
        asked[hosts] = job.store.requests / len(watches)
        time.sleep(0.2)
        assert not job.left
    assert 0 < asked[8] < 1.5 * asked[2]


def test_the_loss_of_a_machine_is_heard_on_all_others(hurry, capsys):
    """Also where nobody looks after it from there."""
    job = Job([0, 0, 1, 1, 2, 2, 3, 3])
    watches = [job.watch(rank) for rank in range(8)]
    for each in watches:
        each.start()
    time.sleep(0.5)
    assert not job.left
    for rank in (4, 5):
        watches[rank]._closed.set()
    wait_for(lambda: len(job.left) == 6, 10)
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert f"(pid {os.getpid()} on host2) died" in told


def test_roll_call_asks_the_store_little_however_many_there_are(hurry):
    job = Job([rank // 8 for rank in range(64)])
    job.store = Counting(job.store)
    watches = [job.watch(rank) for rank in range(64)]
    watches[9].tell("the disk is full")
    job.store.requests = 0
    message, _ = watches[3].roll_call()
    assert message.endswith("ended: the disk is full")
    assert job.store.requests < 20


def test_peers_know_who_lives():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    peer = Peer(1, child.pid, "h", "p")
    wait_for(peer.is_gone)  # also while nobody has asked for its exit code
    child.wait()
    assert peer.is_gone()
    assert not Peer.here(0).is_gone()
