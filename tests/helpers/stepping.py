"""Helpers of `test_step.py` that other tests share."""

import copy
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from first_stage.data import Batch
from first_stage.distributed.processes import Processes
from first_stage.training.step import Trainer


def batch_of(trainer: Trainer, count: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=draw)
    return Batch(pixels, [100 * seed + n for n in range(count)], [""] * count)


def make_trainer(config) -> Trainer:
    return Trainer(config, Accelerator(mixed_precision=config.train.precision), Processes())


def averaged(trainer: Trainer) -> AutoencoderKL:
    """A copy of the autoencoder with its averaged weights."""
    with trainer.ema_weights() as stage:
        return copy.deepcopy(stage.model)


def gradients_of(trainer: Trainer, step: int, batches: list[Batch]) -> dict[str, list]:
    """Run one step; the gradients as they stand before clipping and updating."""
    seen = {}
    update = trainer._update

    def look(step, players):
        for name, player in players.items():
            seen[name] = [
                torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in player.parameters
            ]
        update(step, players)

    with mock.patch.object(trainer, "_update", look):
        trainer.training_step(step, batches)
    return seen


def assert_close(found: dict[str, list], expected: dict[str, list], rtol=1e-4):
    assert set(found) == set(expected)
    for name, gradients in expected.items():
        # Relative to the player's largest gradient: some biases have a gradient of pure rounding.
        scale = max(g.abs().max().item() for g in gradients)
        for f, e in zip(found[name], gradients, strict=True):
            torch.testing.assert_close(f, e, rtol=rtol, atol=rtol * scale)
