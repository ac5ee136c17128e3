"""What a launch shows while it runs: the share done by all processes, the rate, the bottleneck."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_tools.format.plan import Unit, committed_units
from latent_tools.format.shards import read_commit

_LOOK_EVERY = 2.0  # seconds between two looks at the other processes' commits, at least
_LOOK_SHARE = 0.02  # of the time that goes into looks, at most
_READ_AT_ONCE = 64


class Watch:
    """What the other processes have committed, seen by one process for all.

    A look lists the commits, which takes longer the more there are; it is rarer then, so that a
    launch's speed does not depend on the number of units.

    Args:
        folder: The cache.
        known: Units that were committed before this launch.
        own: Units of this process.
        is_looking: Whether this process looks at all; the others count their own failures alone.
    """

    def __init__(self, folder: Path, known: set[int], own: set[int], is_looking: bool):
        self.folder, self.own, self.is_looking = folder, own, is_looking
        self.done: set[int] = set()
        self.failures = 0
        self._unread = deque(sorted(known - own))
        self._next = time.monotonic() + _LOOK_EVERY

    def count(self, failures: int) -> None:
        """Add failures of units that this process works on."""
        self.failures += failures

    def look(self) -> None:
        """Look at the other processes' commits, when it is time to.

        Their failures, and those of earlier launches, are read a few commits at a time; what is not
        read by the end is counted when the cache is finished.
        """
        if not self.is_looking or time.monotonic() < self._next:
            return
        began = time.monotonic()
        for unit in committed_units(self.folder):
            if unit not in self.done and unit not in self.own:
                self.done.add(unit)
                self._unread.appendleft(unit)
        for _ in range(min(_READ_AT_ONCE, len(self._unread))):
            self.failures += len(read_commit(self.folder, self._unread.popleft())["failures"])
        ended = time.monotonic()
        self._next = ended + max(_LOOK_EVERY, (ended - began) / _LOOK_SHARE)


def example_failure(folder: Path) -> tuple[str, str]:
    """Id and reason of one committed failure."""
    for unit in committed_units(folder):
        for failure in read_commit(folder, unit)["failures"]:
            return failure["id"], failure["reason"]
    return "", ""


class Progress:
    """The progress bar of a launch; silent on processes other than the first.

    Args:
        watch: What the others have done.
        left: The units that all processes together have to do.
        is_shown: Whether this process shows the bar.
    """

    def __init__(self, watch: Watch, left: list[Unit], is_shown: bool):
        self._watch = watch
        self._sizes = {unit.number: len(unit) for unit in left}
        self._own_done = 0
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
        self._watch.look()
        if self._bar.disable:
            return
        self._bar.set_postfix_str(self._busiest(), refresh=False)
        self._update()

    def _update(self) -> None:
        others = sum(self._sizes.get(unit, 0) for unit in self._watch.done)
        self._bar.update(max(0, self._own_done + others - self._bar.n))

    def _busiest(self) -> str:
        total = sum(self._waits.values()) or 1.0
        what = max(self._waits, key=lambda name: self._waits[name])
        return f"waits for {what} {self._waits[what] / total:.0%}"

    def close(self) -> None:
        """End the bar where the launch has come to."""
        if not self._bar.disable:
            self._update()
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
