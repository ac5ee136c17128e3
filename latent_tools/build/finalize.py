"""When every unit is committed: the index, the list of failures and the statistics.

Everything is derived from the commits in the order of their units, one at a time, so finishing
twice writes the same, and takes the same memory for any number of samples.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from first_stage.metrics.moments import ChannelMoments
from latent_tools.build.index import is_written, write_index
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan, Unit
from latent_tools.format.shards import ERRORS, is_committed, read_commit
from latent_tools.format.statistics import summary

_READ_AHEAD = 16
_LOOK_AGAIN = 0.5  # seconds


def missing_units(folder: Path, units: list[Unit], patience: float = 0.0) -> list[Unit]:
    """Units without a commit, each asked for by name: a directory's listing may lag behind.

    Args:
        folder: The cache.
        units: The planned units.
        patience: Seconds to wait for commits of other machines to show.
    """
    end = time.monotonic() + patience
    while True:
        units = [unit for unit in units if not is_committed(folder, unit.number)]
        if not units or time.monotonic() > end:
            return units
        time.sleep(_LOOK_AGAIN)


def is_finished(folder: Path, plan: Plan) -> bool:
    """Whether a cache whose units are all committed was finished since."""
    counts = Manifest.load(folder).counts
    planned = {"units": len(plan.units), "failures": counts.get("failures", 0)}
    planned["samples"] = len(plan) - planned["failures"]
    if any(counts.get(name) != number for name, number in planned.items()):
        return False
    return is_written(folder, planned["samples"])


def finalize(folder: Path, plan: Plan | None = None) -> Manifest:
    """Write `index.parquet`, `failures.parquet`, and counts and statistics into the manifest.

    Args:
        folder: The cache, with every planned unit committed.
        plan: The plan, where it is loaded already.

    Returns:
        The manifest.

    Raises:
        CacheError: When a commit is missing, or does not hold exactly its unit's planned samples.
    """
    manifest, plan = Manifest.load(folder), plan if plan is not None else Plan.load(folder)
    totals = _Totals(manifest.tensor_channels)

    def add_all(add: Callable[[dict[str, Any]], None]) -> None:
        nonlocal totals
        totals = _Totals(manifest.tensor_channels)
        for commit in _commits(folder, plan):
            add(commit)
            totals.add(commit)

    write_index(folder, add_all)
    manifest.statistics = totals.statistics(manifest.representation == "moments")
    manifest.counts = {
        "samples": len(plan) - totals.failures,
        "failures": totals.failures,
        "units": len(plan.units),
        "bytes": totals.bytes,
    }
    manifest.save(folder)
    return manifest


def _commits(folder: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """The commits in order, read a few ahead, each checked against the plan."""
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        ahead: deque[tuple[Unit, Future[dict[str, Any]]]] = deque()
        units = iter(plan.units)
        while True:
            while len(ahead) < _READ_AHEAD and (unit := next(units, None)) is not None:
                ahead.append((unit, pool.submit(read_commit, folder, unit.number)))
            if not ahead:
                return
            unit, future = ahead.popleft()
            commit = future.result()
            failed = [failure["id"] for failure in commit["failures"]]
            if sorted([*commit["ids"], *failed]) != sorted(plan.ids(unit)):
                raise CacheError(
                    f"the commit of unit {unit.number} in {str(folder)!r} does not hold exactly "
                    "the planned samples: it was damaged or belongs to another cache"
                )
            yield commit


class _Totals:
    """What is summed over all units."""

    def __init__(self, channels: int):
        self._sums = ChannelMoments(channels)
        self._errors: dict[str, tuple[int, float, float]] = {}
        self.failures = self.bytes = 0

    def add(self, commit: dict[str, Any]) -> None:
        """Add a unit."""
        self.failures += len(commit["failures"])
        self._sums.merge(ChannelMoments.from_json(commit["sums"]))
        if not commit["count"]:
            return
        self.bytes += commit["bytes"]
        for name in ERRORS:
            if (error := commit.get(name)) is not None:
                count, largest, squares = self._errors.get(name, (0, 0.0, 0.0))
                samples = error.get("samples", commit["count"])
                squares += samples * error["rms"] ** 2
                self._errors[name] = (count + samples, max(largest, error["max"]), squares)

    def statistics(self, has_posterior: bool) -> dict[str, Any]:
        """As the manifest has them: errors pooled over all units."""
        found = summary(self._sums, has_posterior)
        for name, (count, largest, squares) in self._errors.items():
            found[name] = {"max": largest, "rms": (squares / count) ** 0.5}
        return found
