"""A cache that follows its data: what changed since it was encoded, noticed at every launch.

A file is looked into again only when the file system says that it was touched since it was encoded
or last looked into: one look at its facts for each sample, and reading those that were touched.
Commits are read only of units with such a sample, as long as the cache's files are those that the
last launch left (`checked`).
For rows of parquet and tar files the file's facts count. Sources without files are spot-checked.

With `update`, samples that changed, are gone, or could not be read before and can now, are taken
out of their units, whose other latents stay bit for bit, and those that are there are planned
anew. Every step can be cut off: the plan is written first, and a unit that holds more samples than
are planned is trimmed by the next launch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from first_stage.data import BrokenImage, MachineFault, Source
from first_stage.files import MachineError, patiently
from latent_tools.build.checked import checked_when, is_as_checked, write_checked
from latent_tools.build.images import plain_value
from latent_tools.build.unit import trimmed
from latent_tools.format.content import content_hash, file_of
from latent_tools.format.files import CacheError
from latent_tools.format.index import INDEX
from latent_tools.format.plan import Plan, committed_units
from latent_tools.format.shards import COMMITS, SHARDS, commit_path, read_commit

RELEASED = ".released"
_READ_BEFORE = 600.0
"""Seconds before its unit's commit that a sample may have been read."""
_SPOT_CHECKS = 4


@dataclass
class Changes:
    """What is different between a cache and its data.

    Attributes:
        changed: Ids whose file, caption or label is another one.
        gone: Ids that are no longer in the data.
        repaired: Ids that could not be encoded, and whose file is another one now.
        lost: Units whose shard is missing or has another size.
        looked_into: How many samples' content was compared.
    """

    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    looked_into: int = 0

    def words(self) -> str:
        """As `12 changed, 3 gone, 2 repaired`; empty when nothing is different."""
        parts = {"changed": self.changed, "gone": self.gone, "repaired": self.repaired}
        return ", ".join(f"{len(names):,} {what}" for what, names in parts.items() if names)

    @property
    def ids(self) -> list[str]:
        """All of them."""
        return [*self.changed, *self.gone, *self.repaired]


def notice(
    folder: Path, plan: Plan, source: Source, ids: pa.Array, everything: bool = False
) -> Changes:
    """Compare a cache with its data.

    Args:
        folder: The cache.
        plan: Its plan.
        source: The data set.
        ids: Its ids.
        everything: Look into every file instead of those that were touched.

    Returns:
        What is different.
    """
    changes, places = Changes(), plan.places_in(ids)
    there = set(committed_units(folder))
    checked = checked_when(folder)
    spots = _spots(sorted(there))
    # A sample may have been read some time before its commit: until all were compared once after
    # the last commit, what was touched since then does not tell what changed.
    since_commits = checked > (folder / COMMITS).stat().st_mtime
    is_known = not everything and since_commits and is_as_checked(folder)
    for unit in plan.units:
        if unit.number not in there:
            continue
        if is_known:
            looking = _Looking(source, checked, False, unit.number in spots, changes)
            if not looking.is_due(places[unit.start : unit.stop].tolist()):
                continue
        commit = read_commit(folder, unit.number)
        if _is_lost(folder, commit):
            changes.lost.append(unit.number)
            continue
        path = commit_path(folder, unit.number)
        written = patiently(path.stat, repr(str(path))).st_mtime
        since = checked if checked > written else written - _READ_BEFORE
        failed_since = max(checked, written)
        where = dict(zip(plan.ids(unit), places[unit.start : unit.stop].tolist(), strict=True))
        looking = _Looking(source, since, everything, unit.number in spots, changes)
        for row, name in enumerate(commit["ids"]):
            if name in where:
                columns = {key: values[row] for key, values in commit["columns"].items()}
                looking.at(name, where[name], commit["content"][row], columns)
        for failure in commit["failures"]:
            if (name := failure["id"]) in where:
                looking.at_failure(name, where[name], failed_since)
    return changes


def _spots(units: Sequence[int]) -> set[int]:
    if not units:
        return set()
    last = _SPOT_CHECKS - 1
    return {units[i * (len(units) - 1) // last] for i in range(_SPOT_CHECKS)}


def _is_lost(folder: Path, commit: dict[str, Any]) -> bool:
    if commit["shard"] is None:
        return False
    path = folder / SHARDS / Path(commit["shard"]).name
    return not path.exists() or path.stat().st_size != commit["bytes"]


class _Looking:
    """Compares the samples of one unit."""

    def __init__(
        self, source: Source, since: float, everything: bool, is_spot: bool, changes: Changes
    ):
        self.source, self.since, self.everything = source, since, everything
        self.is_spot, self.changes = is_spot, changes

    def is_due(self, places: Sequence[int]) -> bool:
        """Whether any of these samples is gone, or was touched since all were compared."""
        return any(
            place < 0
            or self._is_touched("touched", place)
            or self._is_touched("columns_touched", place)
            for place in places
        )

    def at(self, name: str, place: int, content: str, columns: dict[str, Any]) -> None:
        """Look at an encoded sample."""
        if place < 0:
            self.changes.gone.append(name)
            return
        is_due = self._is_touched("touched", place)
        if not is_due and not self._is_touched("columns_touched", place):
            return
        sample = patiently(lambda: self.source.read(place), f"the sample {name!r}")
        is_same = True
        if is_due:
            self.changes.looked_into += 1
            is_same = _content_of(sample.image) == content
        if not is_same or not _are_same(sample.columns, columns):
            self.changes.changed.append(name)

    def at_failure(self, name: str, place: int, since: float) -> None:
        """Look at a sample that could not be encoded."""
        if place < 0:
            self.changes.gone.append(name)
        elif (self._when("touched", place) or 0.0) >= since:
            self.changes.repaired.append(name)

    def _is_touched(self, what: str, place: int) -> bool:
        if self.everything:
            return True
        when = self._when(what, place)
        if when is None:  # nothing is known: the first sample of a few units
            is_first, self.is_spot = self.is_spot, False
            return is_first
        return when >= self.since

    def _when(self, what: str, place: int) -> float | None:
        touched: Callable[[int], float | None] | None = getattr(self.source, what, None)
        return touched(place) if touched is not None else None


def _content_of(image: Any) -> str | None:
    try:
        return content_hash(file_of(image))
    except MachineFault as error:  # says nothing about what is in the file
        raise MachineError(str(error)) from None
    except BrokenImage:
        return None


def _are_same(now: Any, then: dict[str, Any]) -> bool:
    try:
        return all(plain_value(now.get(name), name) == value for name, value in then.items())
    except MachineFault as error:
        raise MachineError(str(error)) from None
    except BrokenImage:
        return False


def follow(
    folder: Path,
    plan: Plan,
    source: Source,
    ids: pa.Array,
    update: bool,
    say: Callable[[str], None],
) -> Plan:
    """Notice changes, and take them in or refuse them.

    Args:
        folder: The cache.
        plan: Its plan.
        source: The data set.
        ids: Its ids.
        update: Take changed, gone and repaired samples out of the plan: those that are there are
            new to it then.
        say: Called with lines for the user.

    Returns:
        The plan, which is not written yet.

    Raises:
        CacheError: When it is another data set, or when samples changed and `update` is false.
    """
    if len(plan) and (plan.places_in(ids) < 0).all():
        raise CacheError(
            f"none of the {len(plan)} samples planned in {str(folder)!r} is in data.path "
            f"{source.name!r}: it is another data set; give another --output"
        )
    started = time.time()
    changes = notice(folder, plan, source, ids)
    for unit in changes.lost:
        path = commit_path(folder, unit)
        path.rename(path.with_name(path.name + RELEASED))
    if changes.lost:
        say(f"{len(changes.lost)} units have lost their shards: they are encoded again")
    if not changes.ids:
        write_checked(folder, started)
        return plan
    if not update:
        if changes.changed:
            raise CacheError(
                f"{changes.words()} of the {len(plan):,} samples in {str(folder)!r} since they "
                f"were encoded (such as {changes.changed[0]!r}): --update encodes what changed and "
                "drops what is gone; for another data set give another --output. Nothing was done"
            )
        say(f"{changes.words()} since the last launch; --update takes that in, until then their "
            "latents stay")  # fmt: skip
        return plan
    say(f"{changes.words()} since the last launch")
    return plan.without(changes.ids)


def trim(folder: Path, plan: Plan) -> int:
    """Take samples that are no longer planned out of their units.

    Args:
        folder: The cache.
        plan: The plan, which is written already.

    Returns:
        How many units were written anew.
    """
    if is_as_checked(folder):
        return 0
    planned = {unit.number: unit for unit in plan.units}
    count = 0
    for number in sorted(committed_units(folder)):
        unit = planned.get(number)
        commit = read_commit(folder, number)
        listed = {*commit["ids"], *(failure["id"] for failure in commit["failures"])}
        keep = set(plan.ids(unit)) if unit is not None else set()
        if not listed - keep or not keep <= listed:
            continue  # what is missing is damage, which finishing tells
        # Until the index is written anew, the cache is not finished.
        (folder / INDEX).unlink(missing_ok=True)
        count += 1
        old = commit["shard"]
        new = trimmed(folder, commit, keep) if keep else None
        if not keep:
            commit_path(folder, number).unlink()
        if old is not None and old != new:
            (folder / SHARDS / Path(old).name).unlink(missing_ok=True)
    return count


def changed_ids(changes: Changes) -> Iterator[tuple[str, str]]:
    """Ids and what is different, for people."""
    yield from ((name, "has other content, caption or label") for name in changes.changed)
    yield from ((name, "is no longer in the data") for name in changes.gone)
    yield from ((name, "could not be encoded, and can be now") for name in changes.repaired)


def first_free_unit(folder: Path, plan: Plan) -> int:
    """The first unit number that nothing has had: behind the plan's and those committed."""
    planned = pc.max(plan.table["unit"]).as_py()
    return max([-1 if planned is None else planned, *committed_units(folder)]) + 1
