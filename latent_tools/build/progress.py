"""What a launch shows while it runs: the share done by all processes, the rate, the bottleneck."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_tools.format.plan import Unit, committed_units
from latent_tools.format.shards import read_commit

_LOOK_EVERY = 2.0  # seconds between two looks at the other processes' commits


class Watch:
    """Counts over all processes, read off the commits.

    Args:
        folder: The cache.
        known: Units that were committed before this launch.
    """

    def __init__(self, folder: Path, known: set[int]):
        self.folder = folder
        self._failures = dict.fromkeys(known, -1)  # -1: not read yet
        self.own: dict[int, int] = {}

    def add_own(self, unit: int, failures: int) -> None:
        """Count failures of a unit that this process works on."""
        self.own[unit] = self.own.get(unit, 0) + failures

    def failures(self) -> int:
        """Samples that failed so far, in all processes and earlier launches."""
        for unit in committed_units(self.folder):
            self._failures.setdefault(unit, -1)
        for unit, count in self._failures.items():
            if count < 0 and unit not in self.own:
                self._failures[unit] = len(read_commit(self.folder, unit)["failures"])
        others = (n for unit, n in self._failures.items() if unit not in self.own)
        return sum(others) + sum(self.own.values())

    def example(self) -> tuple[str, str]:
        """Id and reason of one committed failure."""
        for unit in sorted(committed_units(self.folder)):
            for failure in read_commit(self.folder, unit)["failures"]:
                return failure["id"], failure["reason"]
        return "", ""


class Progress:
    """The progress bar of a launch; silent on processes other than the first.

    Args:
        folder: The cache.
        left: The units that all processes together have to do.
        own: Numbers of the units of this process.
        is_shown: Whether this process shows the bar.
    """

    def __init__(self, folder: Path, left: list[Unit], own: set[int], is_shown: bool):
        self.folder, self.own = folder, own
        self._sizes = {unit.number: len(unit) for unit in left}
        self._own_done = self._others = 0
        self._looked = time.monotonic()
        self._waits = {"data": 0.0, "encoder": 0.0, "disk": 0.0}
        self._bar = tqdm(
            total=sum(self._sizes.values()),
            unit=" images",
            desc="encoding",
            disable=not is_shown,
            # Where the output is a file, a line every ten seconds is enough.
            mininterval=0.3 if sys.stderr.isatty() else 10.0,
            smoothing=0.1,
        )

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Time spent waiting for `data`, `encoder` or `disk`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waits[what] += time.monotonic() - start

    def advance(self, images: int) -> None:
        """Images of this process that are encoded."""
        self._own_done += images
        if self._bar.disable:
            return
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            self._others = self._others_done()
        self._bar.set_postfix_str(self._busiest(), refresh=False)
        self._bar.update(max(0, self._own_done + self._others - self._bar.n))

    def _others_done(self) -> int:
        there = committed_units(self.folder)
        return sum(self._sizes.get(u, 0) for u in there if u not in self.own)

    def _busiest(self) -> str:
        total = sum(self._waits.values()) or 1.0
        what = max(self._waits, key=lambda name: self._waits[name])
        return f"waits for {what} {self._waits[what] / total:.0%}"

    def close(self) -> None:
        """End the bar where the launch has come to."""
        if not self._bar.disable:
            self._bar.update(max(0, self._own_done + self._others_done() - self._bar.n))
        self._bar.close()

    @property
    def waits(self) -> dict[str, float]:
        """Seconds spent waiting, by what for."""
        return dict(self._waits)


def timed(loader: Any, progress: Progress) -> Iterator[Any]:
    """Iterate a loader, counting the time until each item as waiting for data."""
    iterator = iter(loader)
    while True:
        with progress.waiting("data"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
