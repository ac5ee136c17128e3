"""Randomness as a function of numbers instead of a state.

Order, crop, flip and posterior noise are drawn from a counter-based generator (Philox, Salmon et
al. 2011) keyed by the seed, the purpose and the counters that name the draw. Nothing has to be
saved to resume, and the draw does not depend on how many processes or workers there are.
"""

import hashlib
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


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
    RESTART = 9
    """Vectors of a step's batch that unused codes are moved to: (step,)."""
    MIX = 8
    """Where between real and fake a penalty is taken: (position in the stream of samples,)."""
    GEOMETRY = 10
    """How the latents of a step are scaled, flipped or turned: (step,)."""
    DISTURBANCE = 11
    """Noise and mask of a sample's latents: (position in the stream of samples,)."""


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


def hashed_bits(seed: int, purpose: Purpose, epoch: int, names: Iterable[str]) -> np.ndarray:
    """128 random bits for each of many samples: a microsecond each, where a generator takes twenty.

    They are a keyed hash (BLAKE2b) of the sample's name, so a sample's draws stay the same when the
    data set grows or only a part of it is read.

    Args:
        seed: The run's seed, >= 0.
        purpose: What the numbers are for.
        epoch: The epoch, >= 0.
        names: Of the samples.

    Returns:
        `(N, 2)` uint64; a row is a function of seed, purpose, epoch and its name alone.
    """
    keyed = hashlib.blake2b(digest_size=16, key=f"{seed}/{int(purpose)}/{epoch}".encode())
    digests = []
    for name in names:
        own = keyed.copy()
        own.update(name.encode())
        digests.append(own.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the host, on a device; the host goes on while it is being copied.

    Args:
        drawn: On the CPU.
        device: Where it is wanted.
    """
    if device.type == "cuda":  # only from pinned memory does the copy not wait for the device
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def standard_normals(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal values for each seed, by torch's generator.

    Three times faster than numpy's. Torch takes the lower 32 bits of a seed, so two of many draws
    can be the same; that does not matter for noise on different samples.

    Args:
        seeds: N numbers.
        shape: Of the values of one seed.

    Returns:
        `(N, *shape)` float32; a row is a function of its seed alone.
    """
    seeds = list(seeds)
    values = torch.empty(len(seeds), *shape)
    draw = torch.Generator()
    for row, seed in zip(values, seeds, strict=True):
        row.normal_(generator=draw.manual_seed(int(seed) & 0xFFFFFFFF))
    return values
