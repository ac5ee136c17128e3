"""What was compared at the end of the last launch, so that the next one need not read it again.

A launch that finishes writes down what its commits, shards and plan look like from outside: when
the folders last changed, and the shards' names and sizes. As long as they look so, every commit is
the one that was compared with the plan then, and no shard is lost. A copied cache looks different,
and is read once more.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from first_stage.files import write_json
from latent_tools.format.files import read_json
from latent_tools.format.plan import FILE as PLAN
from latent_tools.format.shards import COMMITS, SHARDS

CHECKED = "checked.json"
"""When the data was last found to be what was encoded, and the look of the cache since."""


def checked_when(folder: Path) -> float:
    """When the data was last compared with the cache, in seconds; 0 for never."""
    return float(_written(folder).get("checked", 0.0))


def is_as_checked(folder: Path) -> bool:
    """Whether the cache's files look as they did when the last launch finished."""
    then = _written(folder).get("look")
    return then is not None and then == _look(folder)


def write_checked(folder: Path, when: float) -> None:
    """Write down that the data was compared with the cache."""
    write_json(folder / CHECKED, {**_written(folder), "checked": when})


def write_look(folder: Path) -> None:
    """Write down that each commit holds its planned samples, and that every shard is there."""
    found = {**_written(folder), "look": _look(folder)}
    if found != _written(folder):
        write_json(folder / CHECKED, found)


def _written(folder: Path) -> dict[str, Any]:
    path = folder / CHECKED
    return dict(read_json(path)) if path.exists() else {}


def _look(folder: Path) -> dict[str, Any]:
    plan = (folder / PLAN).stat() if (folder / PLAN).exists() else None
    digest = hashlib.sha256()
    with os.scandir(folder / SHARDS) as entries:
        sizes = sorted((entry.name, entry.stat().st_size) for entry in entries)
    for name, size in sizes:
        digest.update(f"{name} {size}\n".encode())
    return {
        "commits": os.stat(folder / COMMITS).st_mtime_ns,
        "shards": digest.hexdigest(),
        "plan": [plan.st_mtime_ns, plan.st_size] if plan is not None else None,
    }
