"""`LatentDataset` behind a `DataLoader` against one file per image."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import show_turn, table_of
from first_stage.config.schema import ModelConfig
from first_stage.data import Sample
from first_stage.data.sources import ListSource
from first_stage.models.families import family_named
from latent_tools import LatentDataset
from latent_tools.build.launch import precompute
from latent_tools.build.options import CacheOptions
from latent_tools.read.normalization import Sampling

OURS = "LatentDataset"


def benchmark_read(latents: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Time shuffled passes in batches of 64, in this process.

    Args:
        latents: How many.
        shape: `(C, h, w)` of each; their moments are stored.
        repeats: Turns, each a pass over all.

    Returns:
        Items per second, memory and open files, ready for JSON: for the means alone, and with the
        posterior drawn, whose normal values cost everybody the same.
    """
    result: dict[str, Any] = {}
    samplings: tuple[Sampling, ...] = ("mean", "posterior")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_latents(folder, latents, shape)
        for sampling in samplings:
            found: dict[str, list[float]] = {}
            held: dict[str, dict[str, int]] = {}
            for turn in range(repeats):
                for kind, make in _readers(folder, latents, sampling).items():
                    rate, held[kind] = _pass(make())
                    found.setdefault(kind, []).append(rate)
                show_turn(turn, repeats, found)
            print(f"\nsample: {sampling}", end="")
            result[sampling] = table_of(found, OURS)
            for kind, holds in held.items():
                result[sampling][kind] |= holds
                print(
                    f"{kind:34} {holds['open_files']} open files, "
                    f"{holds['resident_bytes'] / 2**20:.0f} MiB resident"
                )
    return result


def _readers(folder: Path, count: int, sampling: Sampling) -> dict[str, Callable[[], Any]]:
    return {
        OURS: lambda: LatentDataset(folder / "cache", sample=sampling, normalize="none"),
        "one npy per image": lambda: FilePerImage(folder / "npy", count, sampling),
        "one npz per image": lambda: FilePerImage(folder / "npz", count, sampling),
    }


class FilePerImage(Dataset[Any]):
    """Moments in one file per image; the posterior is drawn at load, as `LatentDataset` does.

    Args:
        folder: Of `.npy` or `.npz` files.
        count: How many.
        sampling: `mean` or `posterior`.
    """

    def __init__(self, folder: Path, count: int, sampling: Sampling):
        self.folder, self.count, self.sampling = folder, count, sampling

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.folder / f"{index:06d}.{self.folder.name}"
        loaded = np.load(path)
        moments = torch.from_numpy(loaded if path.suffix == ".npy" else loaded["moments"]).float()
        latents, logvar = moments.chunk(2)
        if self.sampling == "posterior":
            latents = latents + (0.5 * logvar).exp() * torch.randn_like(latents)
        return {"latents": latents, "label": index}


def make_latents(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """A cache of moments by the cache's own encoder, and the same in one file per image."""
    channels, side, _ = shape
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    samples = [Sample(f"{index:06d}", Image.fromarray(n)) for index, n in enumerate(noise)]
    layout = ModelConfig(
        latent_channels=channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        mid_block_attention=False, quant_conv=False,
    )  # fmt: skip
    vae = family_named("kl").build(layout, side).eval()
    options = CacheOptions(resolution=side, resize=None, batch_size=64, workers=0)
    precompute(vae, "benchmark", ListSource("noise", samples), str(folder / "cache"), options)
    raw = LatentDataset(folder / "cache", sample="raw", normalize="none")
    for kind in ("npy", "npz"):
        (folder / kind).mkdir()
    for index in range(count):
        moments = raw[index]["latents"].half().numpy()
        np.save(folder / "npy" / f"{index:06d}.npy", moments)
        np.savez(folder / "npz" / f"{index:06d}.npz", moments=moments)


def _pass(dataset: Any) -> tuple[float, dict[str, int]]:
    """Items per second of a shuffled pass, and what the process holds at its end.

    Resident memory counts mapped files that lie in the page cache.
    """
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=0)
    began = time.perf_counter()
    for batch in loader:
        last = batch
    rate = len(dataset) / (time.perf_counter() - began)
    del last
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    return rate, {"open_files": len(os.listdir("/proc/self/fd")), "resident_bytes": resident}
