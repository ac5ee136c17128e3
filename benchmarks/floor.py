"""The least time that a step's arithmetic can take: counted operations over the measured rate."""

import contextlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import device, synchronise
from first_stage.config.schema import Config
from first_stage.data import Batch, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.training.data import make_accelerator
from first_stage.training.step import Trainer


class NoModules:
    """Stands in for the flop counter's module tracker, whose hooks `autograd.grad` cannot bear."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def random_batch(trainer: Trainer) -> Batch:
    """A process's batch of noise in memory: decoding is measured apart."""
    config = trainer.config
    side, count = config.data.resolution, config.train.batch_size // trainer.processes.world
    pixels = torch.randint(0, 256, (count, side, side, config.model.in_channels), dtype=torch.uint8)
    return Batch(pixels, list(range(count)), [""] * count)


_autocast = torch.autocast


def _no_autocast_there(device_type: str, *args: Any, **options: Any) -> Any:
    """The meta device has no autocast, which changes no count."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return _autocast(device_type, *args, **options)


def step_flops(config: Config, step: Callable[[Trainer, Batch], None] | None = None) -> float:
    """Floating-point operations of one step, counted on the meta device: nothing is computed.

    Args:
        config: The recipe, every term entered.
        step: A form of the step; `None`: ours.
    """
    trainer = Trainer(config, make_accelerator(config.train, config.output_dir), Processes())
    meta = torch.device("meta")
    trainer.first_stage.network.to(meta)
    if trainer.critic is not None:
        trainer.critic.network.to(meta)
    for network in trainer.objective.surroundings.networks:
        network.to(meta)
    # The optimizers still hold the parameters that lay on the device.
    for player in [p for p in (trainer.first_stage, trainer.critic) if p is not None]:
        player.optimizer.param_groups[0]["params"] = list(player.network.parameters())
    batch = random_batch(trainer).to(meta)
    if trainer.critic is not None:  # the learned distance begins once the layers' sizes are known
        features = trainer.critic.network(images_from_pixels(batch.pixels)).features
        chosen = config.loss.learned.layers or range(len(features))
        trainer.objective.means.load_state_dict({"magnitude": torch.ones(len(chosen), device=meta)})
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with (
        mock.patch.object(trainer, "_update"),
        mock.patch("benchmarks.steps.apply"),
        mock.patch.object(torch, "autocast", _no_autocast_there),
        counter,
    ):
        if step is None:
            trainer.training_step(0, [batch])
        else:
            step(trainer, batch)
    return float(counter.get_total_flops())


def matrix_rate(precision: str) -> float:
    """Floating-point operations per second of matrix products on this device, the best of sizes."""
    where = device()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    rates = []
    for side in (4096, 8192) if where.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
        for _ in range(20):
            synchronise()
            began = time.perf_counter()
            a @ b
            synchronise()
            rates.append(2.0 * side**3 / (time.perf_counter() - began))
    return max(rates)
