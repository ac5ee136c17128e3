"""What each way to easier latents costs: steps with it against steps without.

    python -m benchmarks disturb --config configs/demo.yaml

The step is that of the recipe with the critic at work. Where a part of the steps or samples is
disturbed, all are here: the cost of a run lies between nothing and what is printed.
"""

from typing import Any

from accelerate import Accelerator

from benchmarks.floor import random_batch
from benchmarks.timing import clock, spread, text
from benchmarks.training import started
from first_stage.config import parse_config
from first_stage.distributed.processes import Processes
from first_stage.training.step import Trainer

_WAYS: dict[str, dict[str, object]] = {
    "none": {},
    "equivariance (scale)": {
        "disturb.equivariance.probability": 1,
        "disturb.equivariance.least_scale": 0.5,  # the critic needs so many pixels
    },
    "equivariance (flip, turn)": {
        "disturb.equivariance.probability": 1,
        "disturb.equivariance.transforms": "[flip,turn]",
    },
    "noise": {"disturb.noise.probability": 1},
    "prefix": {"disturb.prefix.probability": 1, "disturb.prefix.channels": 1},
    "variance": {"loss.variance.weight": 0.01},
    "spectrum": {"loss.spectrum.weight": 0.05},
}


def benchmark_disturb(recipe: list[str], repeats: int, steps: int = 4) -> dict[str, Any]:
    """Time steps with each way in turns.

    Args:
        recipe: As for training.
        repeats: Turns.
        steps: Steps of each way in a turn: several, for scales differ.

    Returns:
        By way, seconds of CPU a step took and how many times a plain step's, each with its spread.
    """
    trainers, batches = {}, {}
    for name, fields in _WAYS.items():
        more = [str(part) for key, value in fields.items() for part in (f"--{key}", value)]
        config = started(parse_config([*recipe, *more]))
        trainers[name] = Trainer(config, Accelerator(mixed_precision="no"), Processes())
        batches[name] = random_batch(trainers[name])
        trainers[name].training_step(0, [batches[name]])
    seconds: dict[str, list[float]] = {name: [] for name in _WAYS}
    for turn in range(repeats):
        elapsed = dict.fromkeys(_WAYS, 0.0)
        for step in range(1 + turn * steps, 1 + (turn + 1) * steps):
            for name, trainer in trainers.items():
                began = clock()
                trainer.training_step(step, [batches[name]])
                elapsed[name] += clock() - began
        for name, total in elapsed.items():
            seconds[name].append(total / steps)
    found = {}
    for name, found_seconds in seconds.items():
        times = [a / b for a, b in zip(found_seconds, seconds["none"], strict=True)]
        found[name] = {"seconds": spread(found_seconds), "times": spread(times)}
        print(f"{name:28} {text(found_seconds, '.3f'):>26} s {text(times, '.2f'):>20} x")
    return found
