"""What a step draws, each number a function of the seed and a sample's place in the stream.

So the draws of a step are the same for any number of processes, workers and micro-batches.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from first_stage.config.disturb import DisturbConfig, EquivarianceConfig
from first_stage.models.disturb import Disturbance, Geometry
from first_stage.seeding import Purpose, generator


def normals(seed: int, purpose: Purpose, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal values for each position.

    Args:
        seed: The run's seed.
        purpose: What they are for.
        positions: Of B samples in the stream.
        shape: Of one sample's values.

    Returns:
        `(B, *shape)` float32, on the CPU.
    """
    values = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(values, positions, strict=True):
        generator(seed, purpose, position).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(values)


def uniforms(seed: int, purpose: Purpose, positions: Sequence[int]) -> Tensor:
    """A value in [0, 1) for each position, `(B,)` float32, on the CPU."""
    values = [generator(seed, purpose, position).random() for position in positions]
    return torch.tensor(values, dtype=torch.float32)


def disturbance(
    seed: int,
    config: DisturbConfig,
    step: int,
    positions: Sequence[int],
    shape: tuple[int, int, int],
) -> Disturbance:
    """What a step does to its latents: one change of place, noise and mask for each sample.

    Args:
        seed: The run's seed.
        config: What the recipe wants.
        step: The step: all its processes and micro-batches move their latents alike.
        positions: Of B samples in the stream.
        shape: Of one sample's latents, `(C, h, w)`.

    Returns:
        On the CPU.
    """
    geometry = _geometry(seed, config.equivariance, step, shape[1])
    if not config.draws_for_samples:
        return Disturbance(geometry)
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    amounts, kept = [], []
    for row, position in zip(noise, positions, strict=True):
        draw = generator(seed, Purpose.DISTURBANCE, position)
        noisy, share, cut, prefix = draw.random(4)
        amounts.append((config.noise.strength, share if noisy < config.noise.probability else 0.0))
        least = min(config.prefix.channels, shape[0])
        few = least + int(prefix * (shape[0] + 1 - least))
        kept.append(few if cut < config.prefix.probability else shape[0])
        if config.noise.probability > 0:
            draw.standard_normal(dtype=np.float32, out=row)
    noisy_at_all, cut_at_all = config.noise.probability > 0, config.prefix.probability > 0
    return Disturbance(
        geometry,
        torch.from_numpy(noise) if noisy_at_all else None,
        torch.tensor(amounts, dtype=torch.float32).mT if noisy_at_all else None,
        torch.tensor(kept) if cut_at_all else None,
    )


def _geometry(seed: int, config: EquivarianceConfig, step: int, rows: int) -> Geometry | None:
    """How the latents of a step are moved; `None` in a step that trains as usual."""
    draw = generator(seed, Purpose.GEOMETRY, step)
    moves, which, amount = draw.random(3)
    if moves >= config.probability:
        return None
    kind = config.transforms[int(which * len(config.transforms))]
    if kind == "flip":
        return Geometry(kind)
    if kind == "turn":
        return Geometry(kind, 1 + int(amount * 3))
    least = max(math.ceil(config.least_scale * rows), 1)
    return Geometry(kind, least + int(amount * (rows - least))) if least < rows else None
