"""Randomness as a function of numbers instead of a state.

Order, crop, flip and posterior noise are drawn from a counter-based generator (Philox, Salmon et
al. 2011) keyed by the seed, the purpose and the counters that name the draw. Nothing has to be
saved to resume, and the draw does not depend on how many processes or workers there are.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a stream."""

    ORDER = 1
    """Permutation of an epoch: (epoch,)."""
    VIEW = 2
    """Crop and flip of a sample: (epoch, sample index)."""
    NOISE = 3
    """Posterior noise in training: (position in the stream of samples,)."""
    LATENT = 4
    """Posterior draw from a latent cache: (epoch, sample index)."""
    SPLIT = 6
    """Choice of held-out samples and other fixed choices of a run."""
    PRIOR = 7
    """Latents drawn from the prior in training: (position in the stream of samples,)."""
    MIX = 8
    """Where between real and fake a penalty is taken: (position in the stream of samples,)."""


def generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments.

    Args:
        seed: The run's seed, >= 0.
        purpose: What the numbers are for.
        counters: Non-negative integers that name the draw, such as (epoch, sample index).

    Returns:
        A fresh `numpy.random.Generator`; equal arguments give equal streams.
    """
    entropy = np.random.SeedSequence((seed, int(purpose), *counters))
    return np.random.Generator(np.random.Philox(entropy))
