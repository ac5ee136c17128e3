"""A cache launch, from image files to a finished cache, against the plain loops."""

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.cache_rates import cache_rates
from benchmarks.timing import device, peak_memory, show_turn, synchronise, table_of
from first_stage.config import parse_config
from first_stage.config.types import Precision
from first_stage.data import Source, cache_workers, open_source
from first_stage.distributed.memory import keep_freed_memory
from first_stage.training.players import make_first_stage
from latent_tools.build.encoder import autocast
from latent_tools.build.launch import Process, precompute
from latent_tools.build.options import CacheOptions

OURS = "ours, files to cache"


def benchmark_cache(recipe: list[str], images: int, side: int, repeats: int) -> dict[str, Any]:
    """Time a cache launch against the loops that people write, and its share of encode-only.

    Args:
        recipe: Of the first stage to encode with (random weights: they cost the same).
        images: How many files are made and encoded.
        side: Their side in pixels; already small, so that decoding does not hide the rest.
        repeats: Turns.

    Returns:
        Images per second of everything, ready for JSON.
    """
    vae, batch_size, precision = _first_stage(recipe, side)
    plain = copy.deepcopy(vae)  # the cache's encoder turns its own to another memory layout
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(str(write_images(folder / "images", images, side)))
        options = CacheOptions(
            resolution=side,
            resize=side,
            batch_size=batch_size,
            precision=precision,
            workers=cache_workers(device()),
        )
        for turn in range(repeats):
            os.sync()  # what an earlier turn left to write must not slow this one's commits
            rates = cache_rates(vae, source, options, device())
            now = {
                "encode only": rates.encode_only,
                "decode only, one process": rates.decode_only,
                OURS: rates.end_to_end,
            }
            with autocast(device(), precision):
                for size in (1, batch_size):
                    now[f"plain loop, batch {size}"] = plain_loop(plain, source, folder, side, size)
            for kind, value in now.items():
                found.setdefault(kind, []).append(value)
            show_turn(turn, repeats, found)
    return table_of(found, OURS) | {"images": images, "side": side, "batch_size": batch_size}


def run_one(recipe: list[str], images: int, side: int) -> dict[str, float]:
    """Seconds and peak memory of one launch in this process."""
    vae, batch_size, precision = _first_stage(recipe, side)
    options = CacheOptions(resolution=side, resize=side, batch_size=batch_size, precision=precision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_source(str(write_images(folder / "images", images, side)))
        began = time.perf_counter()
        process = Process(device=device())
        precompute(vae, "benchmark", source, folder / "cache", options, process)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_memory_bytes": peak_memory()}


def _first_stage(recipe: list[str], side: int) -> tuple[Any, int, Precision]:
    """A first stage with random weights, and the recipe's batch size and precision."""
    if device().type == "cpu":
        keep_freed_memory()  # as the command does; here the plain loops have it too
    config = parse_config(recipe)
    torch.manual_seed(0)
    vae = make_first_stage(config.model, side).model.to(device())
    return vae, config.train.batch_size, config.train.precision


@torch.no_grad()
def plain_loop(vae: Any, source: Source, folder: Path, side: int, batch_size: int) -> float:
    """Images per second of the loop that people write: load, `vae.encode`, one `.npy` an image."""
    target = folder / f"npy-{batch_size}"
    target.mkdir(exist_ok=True)
    where = device()
    synchronise()
    began = time.perf_counter()
    for first in range(0, len(source), batch_size):
        indices = range(first, min(first + batch_size, len(source)))
        arrays = []
        for index in indices:
            with Image.open(source.read(index).image) as image:
                picture = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(picture))
        pixels = torch.from_numpy(np.stack(arrays)).to(where)
        images = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()
        latents = vae.encode(images).latent_dist.sample()
        for index, latent in zip(indices, latents.float().cpu().numpy(), strict=True):
            np.save(target / f"{index:06d}.npy", latent)
    return len(source) / (time.perf_counter() - began)


def write_images(folder: Path, count: int, side: int) -> Path:
    """Small JPEG files with some structure."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:06d}.jpg", quality=90)
    return folder
