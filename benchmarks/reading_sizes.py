"""`LatentDataset` at many numbers of samples, with labels and captions: does a batch cost the same?

The samples of a large cache share a few shards, so that only what depends on their number is
measured: the index.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.reading import make_latents
from benchmarks.timing import show_turn, table_of
from latent_tools import LatentDataset, LatentStream, Manifest
from latent_tools.build.index import write_index
from latent_tools.format.index import SIZE
from latent_tools.format.plan import committed_units
from latent_tools.format.shards import COMMITS, SHARDS, read_commit

_BATCH, _BATCHES, _STORED = 64, 300, 2048


def benchmark_sizes(counts: list[int], shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Time batches of 64 random samples of caches that differ in nothing but their size.

    Args:
        counts: Numbers of samples.
        shape: `(C, h, w)` of each latent; their moments are stored.
        repeats: Turns, each of 300 batches of each cache, at random and streamed.

    Returns:
        Items per second and memory by number of samples, ready for JSON.
    """
    torch.set_num_threads(1)  # as in a data loader's worker
    with tempfile.TemporaryDirectory() as name:
        make_latents(Path(name), _STORED, shape)
        datasets = {}
        for count in counts:
            began = time.perf_counter()
            folder = _enlarged(Path(name, "cache"), Path(name, f"{count}"), count)
            print(f"index of {count:,} samples written in {time.perf_counter() - began:.1f} s")
            datasets[count] = LatentDataset(folder, sample="mean", normalize="none")
            _touch(datasets[count])
        found: dict[str, list[float]] = {}
        for turn in range(repeats + 1):  # the first one warms up
            now = {}
            for count, dataset in datasets.items():
                now[f"{count:,} at random"] = _rate(lambda d=dataset, t=turn: _at_random(d, t))
            for count, dataset in datasets.items():
                now[f"{count:,} streamed"] = _rate(lambda d=dataset: _streamed(d))
            for kind, rate in now.items() if turn else ():
                found.setdefault(kind, []).append(rate)
            if turn:
                show_turn(turn - 1, repeats, found)
        result = table_of(found, f"{counts[0]:,} at random")
        for count, dataset in datasets.items():
            held = _held(dataset)
            result[f"{count:,} at random"] |= held
            sizes = ", ".join(f"{what} {size / 2**20:.0f} MiB" for what, size in held.items())
            print(f"{count:>12,} samples: {sizes}")
    return result


def _enlarged(cache: Path, folder: Path, count: int) -> Path:
    """A cache whose index has so many samples, on the shards of a small one."""
    folder.mkdir()
    (folder / COMMITS).mkdir()
    (folder / SHARDS).symlink_to(cache / SHARDS)
    shutil.copy(cache / "manifest.json", folder)
    stored = [read_commit(cache, unit) for unit in sorted(committed_units(cache))]

    def add_all(add: Callable[[dict[str, Any]], None]) -> None:
        written = unit = 0
        while written < count:
            commit = stored[unit % len(stored)]
            rows = min(commit["count"], count - written)
            numbers = range(written, written + rows)
            captions = [f"a photo of thing {n}, seen from the left in May" for n in numbers]
            add(
                {
                    **commit,
                    "unit": unit,
                    "count": rows,
                    "ids": [f"n{n // 1300:08d}/n{n:010d}.JPEG" for n in numbers],
                    "columns": {"label": [n // 1300 for n in numbers], "caption": captions},
                    **{name: commit[name][:rows] for name in ("content", "original_size", "crop")},
                }
            )
            written, unit = written + rows, unit + 1

    write_index(folder, add_all)
    manifest = Manifest.load(folder)
    manifest.counts["samples"] = count
    manifest.save(folder)
    return folder


def _touch(dataset: LatentDataset) -> None:
    """Every page of the index once, as the first tenth of an epoch does."""
    for name in ("id", SIZE, *dataset.column_names):
        for chunk in dataset.column(name).chunks:
            for buffer in filter(None, chunk.buffers()):
                np.frombuffer(buffer, np.uint8)[::4096].sum()


def _at_random(dataset: LatentDataset, seed: int) -> Iterator[Any]:
    # Drawn as they are needed: torch's own shuffle would list all samples first.
    draw = np.random.default_rng(seed)
    rows = (draw.integers(0, len(dataset), _BATCH).tolist() for _ in range(_BATCHES))
    return iter(DataLoader(dataset, batch_sampler=rows))  # type: ignore[arg-type]


def _streamed(dataset: LatentDataset) -> Iterator[Any]:
    return islice(DataLoader(LatentStream(dataset), batch_size=_BATCH), _BATCHES)


def _rate(batches: Callable[[], Iterator[Any]]) -> float:
    """Items per second of this process's own time, which a busy machine does not stretch."""
    read = batches()
    next(read)
    began = time.process_time()
    items = sum(len(batch["id"]) for batch in read)
    return items / (time.process_time() - began)


def _held(dataset: LatentDataset) -> dict[str, int]:
    """Bytes that a worker of two has for itself, and with its part of what all share."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(dataset), _BATCH).tolist() for _ in range(_BATCHES)]
    loader = DataLoader(dataset, batch_sampler=rows, num_workers=2)  # type: ignore[arg-type]
    read = iter(loader)
    for _ in range(_BATCHES - 10):
        next(read)
    worker = read._workers[0]  # type: ignore[attr-defined]
    found = {"process": _memory("self"), "worker": _memory(str(worker.pid))}
    del read
    return {f"{who}_{what}": size for who, sizes in found.items() for what, size in sizes.items()}


def _memory(process: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        sizes[name] = int(value.split()[0]) * 1024
    # Mapped files count as resident; they are the system's page cache, shared and given back.
    return {"own": sizes["Private_Dirty"], "resident": sizes["Rss"]}
