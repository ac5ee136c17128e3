"""What a step draws, each number a function of the seed and a sample's place in the stream.

So the draws of a step are the same for any number of processes, workers and micro-batches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
