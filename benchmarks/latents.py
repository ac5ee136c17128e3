"""What it saves to train a decoder from cached latents: images a second, against from images.

    python -m benchmarks latents --config configs/demo.yaml

The recipe's network and losses with the critic at work, the decoder alone learning, on centre crops
of the recipe's images; reading files and latents is part of it, in this process.
"""

import tempfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from benchmarks.timing import clock, spread, text
from benchmarks.training import started
from first_stage.config import Config, parse_config
from first_stage.data import Batch
from first_stage.data.stream import collate
from first_stage.distributed.processes import Processes
from first_stage.training.data import open_data, open_stream, pair_latents
from first_stage.training.players import make_first_stage
from first_stage.training.step import Trainer
from latent_tools import CachedLatents, CacheOptions, precompute

_ALONE = {
    "train.parts": "[decoder]", "train.encoder_steps": "null", "data.crop": "center",
    "data.flip": "none", "data.latents": None, "model.pretrained": None,
    "data.least_scale": 1, "data.jitter_saturation": 0, "data.jitter_hue": 0,
    "data.late_resolution": "null", "data.late_steps": 0,
}  # fmt: skip
_WAYS = ("images", "latents")


def benchmark_latents(recipe: list[str], repeats: int, steps: int = 4) -> dict[str, Any]:
    """Time steps of both ways in turns.

    Args:
        recipe: As for training.
        repeats: Turns.
        steps: Steps of each way in a turn.

    Returns:
        By way, `seconds` of CPU (of the wall, on a GPU) for a step with its data and `images` a
        second, and of latents `times` as many; each with its spread.
    """
    with tempfile.TemporaryDirectory() as folder:
        configs = _configs(recipe, Path(folder))
        trainers = {
            way: Trainer(config, Accelerator(mixed_precision="no"), Processes())
            for way, config in configs.items()
        }
        batches = {
            way: _batches(config, trainers[way], Path(folder)) for way, config in configs.items()
        }
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(repeats + 1):
            for way in _WAYS:
                began = clock()
                for step, batch in enumerate(islice(batches[way], steps), turn * steps):
                    trainers[way].training_step(step, [batch.to(trainers[way].accelerator.device)])
                if turn:  # the first one warms up
                    seconds[way].append((clock() - began) / steps)
    size = configs["images"].train.batch_size
    times = [a / b for a, b in zip(seconds["images"], seconds["latents"], strict=True)]
    found: dict[str, Any] = {}
    for way in _WAYS:
        rates = [size / s for s in seconds[way]]
        found[way] = {"seconds": spread(seconds[way]), "images": spread(rates)}
        print(f"from {way:8} {text(rates, '.1f'):>24} images/s")
    found["latents"]["times"] = spread(times)
    print(f"{'':13} {text(times, '.2f'):>24} x")
    return found


def _configs(recipe: list[str], folder: Path) -> dict[str, Config]:
    """A first stage, its cache, and the recipe with and without it."""
    whole = parse_config([*recipe, *_line({k: v for k, v in _ALONE.items() if v is not None})])
    stage = make_first_stage(whole.model, whole.data.resolution)
    stage.model.save_pretrained(folder / "first_stage")
    source, _ = open_data(
        whole.data, folder=folder, seed=whole.seed, batch_size=whole.train.batch_size
    )
    view = whole.data.view(whole.data.resolution)
    options = CacheOptions(
        resolution=view.resolution, resize=view.resize,
        reading=whole.data.reading(stage.in_channels),
    )  # fmt: skip
    cache = folder / "cache"
    precompute(stage, str(folder / "first_stage"), source, cache, options)
    fields = {**_ALONE, "model.pretrained": folder / "first_stage"}
    return {
        way: started(parse_config([*recipe, *_line({**fields, "data.latents": latents})]))
        for way, latents in zip(_WAYS, (None, cache), strict=True)
    }


def _batches(config: Config, trainer: Trainer, folder: Path) -> Iterator[Batch]:
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    source, _ = open_data(config.data, folder=folder, **sizes)
    stage, data = trainer.first_stage.network, config.data
    latents = None if data.latents is None else CachedLatents(data.latents)
    given = pair_latents(latents, source, data, stage)
    stream = open_stream(source, data, given, channels=stage.in_channels, **sizes)
    size = config.train.batch_size
    for start in count(0, size):
        yield collate([stream[n] for n in range(start, start + size)])


def _line(fields: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in fields.items()
        for part in (f"--{name}", "null" if value is None else str(value))
    ]
