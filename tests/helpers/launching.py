"""Starts trainings on several processes as users do, and in ways that they would rather not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

TRAIN = ROOT / "scripts" / "train.py"


def environment(**more: str) -> dict[str, str]:
    """The environment of a CPU job that imports this repository."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'distributed'}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # for `where_it_hangs`
        **more,
    }


def command(processes: int, script: Path, *line: object) -> list[str]:
    """The command line that starts a script on so many processes."""
    rest = [str(script), *map(str, line)]
    if processes == 1:
        return [sys.executable, *rest]
    # A port of 0 lets the launcher pick a free one, so that tests can run side by side.
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *rest,
    ]


def start(line: list[str], output: Path, **options: object) -> subprocess.Popen:
    """Start a command in a process group of its own; both of its outputs go to a file."""
    with output.open("w") as stream:
        return subprocess.Popen(
            line,
            cwd=options.pop("cwd", ROOT),
            env=options.pop("env", environment()),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, output: Path, timeout: float = 240) -> str:
    """Wait for a process; what it printed. A process that takes too long is killed, with all."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        told = where_it_hangs(process, output)
        raise AssertionError(f"not finished in {timeout} s:\n{told}") from None
    return output.read_text()


def wait_for(
    process: subprocess.Popen, output: Path, condition: Callable[[], object], seconds: float = 90
) -> None:
    """Wait for something that a process does. One that does not do it is killed, with all."""
    try:
        wait_until(lambda: process.poll() is not None or condition(), seconds)
        assert process.poll() is None, f"it ended with {process.returncode}"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{where_it_hangs(process, output)}") from None


def where_it_hangs(process: subprocess.Popen, output: Path) -> str:
    """What a process has printed, and where each thread of it and of its children stands.

    Python's fault handler tells that as it dies, so all of them are dead then.
    """
    if process.poll() is None:
        for pid in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    kill_group(process)
    return output.read_text()


def run(processes: int, script: Path, *line: object, output: Path, **options: object) -> str:
    """Run a script to its end and demand success; what it printed."""
    process = start(command(processes, script, *line), output, **options)
    text = finish(process, output)
    assert process.returncode == 0, text
    return text


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it started; launchers put theirs in other groups."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        below = descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in below:
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 90, every: float = 0.05) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(every)


def descendants(pid: int) -> list[int]:
    """Process ids below a process, nearest first."""
    found: list[int] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found.append(int(child))
        found += descendants(int(child))
    return found


def trainings(launcher: int, script: str = "train.py") -> dict[int, int]:
    """Rank to process id of the trainings below a launcher."""
    ranks = {}
    for pid in descendants(launcher):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        ranked = dict(v.split("=", 1) for v in variables if "=" in v)
        if any(script in part for part in line) and "RANK" in ranked and parent == launcher:
            ranks[int(ranked["RANK"])] = pid
    return ranks
