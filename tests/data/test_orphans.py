"""Decoding processes end with the one that wants their batches, however it ends."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PROGRAM = """
import multiprocessing, os, sys, time
from torch.utils.data import DataLoader
from first_stage.data import prepare_worker

class Slow:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        with open(f"{sys.argv[1]}/{os.getpid()}", "w"):
            time.sleep(600)

if __name__ == "__main__":
    next(iter(DataLoader(
        Slow(), num_workers=2, worker_init_fn=prepare_worker,
        multiprocessing_context=sys.argv[2],
    )))
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system has no such call")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_of_a_killed_process_end_in_the_middle_of_a_sample(tmp_path, context):
    program, pids = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(PROGRAM)
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, program, pids, context], env=os.environ)
    deadline = time.monotonic() + 100
    while len(os.listdir(pids)) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [psutil.Process(int(name)) for name in os.listdir(pids)]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert alive == []
