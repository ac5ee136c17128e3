"""What the benchmarks share: clocks, spreads, tables, and what they were measured on."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

import first_stage


def device() -> torch.device:
    """The device that training would use."""
    return Accelerator().device


def synchronise() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds of CPU, or of the wall where the work is a device's."""
    synchronise()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def peak_memory() -> int:
    """Peak bytes of the accelerator, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Time spent inside functions, those inside them not counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def around(self, owner: Any, function: str, name: str) -> Iterator[None]:
        """Time a function of an object under a name; `None` has nothing to time."""
        if owner is None:
            yield
            return
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            began = time.perf_counter()
            self._inner.append(0.0)
            result = original(*args, **kwargs)
            synchronise()
            elapsed = time.perf_counter() - began
            own = elapsed - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed
            return result

        with mock.patch.object(owner, function, timed):
            yield

    def shares(self, total: float) -> dict[str, float]:
        """Each name's share of the total, and the rest."""
        shares = {name: seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "rest": max(1.0 - sum(shares.values()), 0.0)}


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(values: list[float], form: str) -> str:
    """Median and spread in a few characters."""
    found = spread(values)
    return f"{found['median']:{form}} ({found['min']:{form}}-{found['max']:{form}})"


def show_turn(turn: int, repeats: int, speeds: dict[str, list[float]]) -> None:
    """One line per turn, so that a long run can be watched."""
    now = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
    print(f"turn {turn + 1} of {repeats}, per second: {now}", file=sys.stderr, flush=True)


def table_of(found: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Print a table of rates, ours over each, and return it."""
    print(f"\n{'':34} {'per second':>26} {'ours is':>20}")
    table = {}
    for name, values in found.items():
        ratios = [a / b for a, b in zip(found[ours], values, strict=True)]
        table[name] = {"per_second": spread(values), "ours_is_times": spread(ratios)}
        print(f"{name:34} {text(values, '.1f'):>26} {text(ratios, '.2f') + 'x':>20}")
    return table


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    on_cuda = device().type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "first_stage": first_stage.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    """The processor's model."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
