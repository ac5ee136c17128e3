"""How cost grows: training with resolution, batch and processes; caching with images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.training import COMMAND, OURS, run_apart
from first_stage.config import parse_config


def benchmark_scale(
    recipe: list[str], seconds: float, counts: list[int], side: int, picture: Path | None
) -> dict[str, Any]:
    """Measure each point in processes of its own.

    Args:
        recipe: As for training; its resolution and batch are the middle of what is tried.
        seconds: About how long a point of training runs.
        counts: How many images are cached.
        side: Of those, in pixels.
        picture: Where the plot goes; `None` draws none.

    Returns:
        Points of every curve, ready for JSON.
    """
    config = parse_config(recipe)
    resolution, batch = config.data.resolution, config.train.batch_size
    cores = len(os.sched_getaffinity(0))
    one_size = ["--data.late_resolution", "null", "--data.late_steps", "0"]
    flags = {
        "resolution": [
            (side, ["--data.resolution", str(side), *one_size])
            for side in _around(resolution, (1, 2, 4, 8))
        ],
        "batch": [
            (size, ["--train.batch_size", str(size)]) for size in _around(batch, (0.25, 0.5, 1, 2))
        ],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, points in flags.items():
        for value, flag in points:
            _add(found, name, value, run_apart([*recipe, *flag], OURS, seconds))
    for processes in [n for n in (1, 2, 4, 8) if n <= cores]:
        whole = ["--train.batch_size", str(batch * processes)]
        made = run_apart([*recipe, *whole], OURS, seconds, processes, threads=1)
        _add(found, "processes", processes, made)
    for count in counts:
        _add(found, "cached images", count, _cached(recipe, count, side))
    if picture is not None:
        draw(found, picture)
        print(f"plot    {picture}")
    return dict(found)


def _around(middle: int, factors: tuple[float, ...]) -> list[int]:
    return sorted({max(1, round(middle * factor)) for factor in factors})


def _add(
    found: dict[str, list[dict[str, float]]], name: str, value: int, made: dict[str, float]
) -> None:
    """Keep a point and print its line."""
    if name not in found:
        print(f"\n{name:>14} {'images/s':>10} {'seconds':>10} {'peak memory':>14}")
    point = {name: float(value), **made}
    if "seconds" in point:
        point["images_per_second"] = value / point["seconds"]
    found.setdefault(name, []).append(point)
    seconds = f"{point['seconds']:.1f}" if "seconds" in point else ""
    print(
        f"{value:>14} {point['images_per_second']:>10.1f} {seconds:>10} "
        f"{point['peak_memory_bytes'] / 2**20:>10.0f} MiB",
        flush=True,
    )


def _cached(recipe: list[str], count: int, side: int) -> dict[str, float]:
    line = [sys.executable, str(COMMAND), "cache", "--only", OURS, "--images", str(count)]
    result = subprocess.run(
        [*line, "--side", str(side), *recipe], capture_output=True, text=True, check=True
    )
    made: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return made


def draw(found: dict[str, list[dict[str, float]]], picture: Path) -> None:
    """The curves in one picture."""
    import matplotlib.pyplot as plt

    axes_of = {
        "resolution": ("images_per_second", "training: images/s"),
        "batch": ("images_per_second", "training: images/s"),
        "processes": ("images_per_second", "training: images/s"),
        "cached images": ("seconds", "caching: seconds"),
    }
    figure, axes = plt.subplots(1, len(axes_of), figsize=(13, 3), layout="constrained")
    for axis, (name, (value, label)) in zip(axes, axes_of.items(), strict=True):
        xs = [point[name] for point in found[name]]
        axis.plot(xs, [point[value] for point in found[name]], "o-", color="#2a6f97", label=label)
        axis.set(xlabel=name, ylabel=label, ylim=(0, None), xticks=xs)
        axis.tick_params(axis="x", labelrotation=45)
        memory = axis.twinx()
        mib = [point["peak_memory_bytes"] / 2**20 for point in found[name]]
        memory.plot(xs, mib, "s--", color="#c2703d", markersize=4)
        memory.set(ylabel="peak memory, MiB", ylim=(0, 1.2 * max(mib)))
        memory.yaxis.label.set_color("#c2703d")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
