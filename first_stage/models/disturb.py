"""Latents that are changed between bottleneck and decoder, and images that are changed alike.

A decoder that is only ever given what its encoder makes need not be smooth around it, and an
encoder whose latents are only ever decoded as they are may scatter an image over them in any order.
Either makes a diffusion model's task harder than it has to be. `disturb` is the one place where
training changes that: what it does is drawn before (`training.draws`), and evaluation, export and
cache never come here.

    geometry    scaled, flipped or turned latents against images scaled, flipped or turned alike:
                |T x - D(T z)| (Kouzelis et al. 2025, "EQ-VAE", equation 5; by scale alone:
                Skorokhodov et al. 2025, "Improving the diffusability of autoencoders")
    noise       z' = (1 - t) z + t g s(z) e with t in U(0, 1) and e standard normal (Yang et al.
                2025, "Latent denoising makes good visual tokenizers", equation 1, whose latents
                have the standard deviation 1 that s(z) measures here)
    prefix      the first channels alone, the others 0 (Chen et al. 2025, "DC-AE 1.5", section 3.2)
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from first_stage.config.disturb import DisturbConfig, Transform
from first_stage.errors import ConfigError
from first_stage.models.bottlenecks import Bottleneck
from first_stage.models.discrete import Discrete

_TINY = 1e-8


class Geometry(NamedTuple):
    """A change of place, the same for all samples of a step.

    Attributes:
        kind: What is done.
        amount: Rows of latents that are left (scale), or quarter turns from 1 to 3 (turn).
    """

    kind: Transform
    amount: int = 0


class Disturbance(NamedTuple):
    """What one micro-batch is disturbed with.

    Attributes:
        geometry: Of the step; `None` leaves everything where it is.
        noise: `(B, C, h, w)` standard normal; `None` without.
        amounts: `(B,)`, the standard deviation of each sample's noise before it is mixed in (g),
            and in another row how much of the latents it replaces (t): `(2, B)`.
        kept: `(B,)` how many channels of each sample are kept; `None` for all.
    """

    geometry: Geometry | None = None
    noise: Tensor | None = None
    amounts: Tensor | None = None
    kept: Tensor | None = None


def disturb(latents: Tensor, images: Tensor, draw: Disturbance) -> tuple[Tensor, Tensor]:
    """Latents to decode instead of others, and what they are to be decoded to.

    Args:
        latents: `(B, C, h, w)` as the bottleneck gives them.
        images: `(B, C_in, H, W)` that they encode.
        draw: What to do.

    Returns:
        Latents `(B, C, h', w')` with the gradient of the given ones, and images
        `(B, C_in, f h', f w')`; the very tensors given where the draw says nothing of them.
    """
    targets = images
    if draw.geometry is not None:
        factor = images.shape[-1] // latents.shape[-1]
        latents, targets = moved(latents, draw.geometry), moved(images, draw.geometry, factor)
    if draw.noise is not None and draw.amounts is not None:
        latents = mixed(latents, like(latents, draw.noise), *draw.amounts)
    if draw.kept is not None:
        latents = prefix(latents, draw.kept)
    return latents, targets


def moved(x: Tensor, geometry: Geometry, factor: int = 1) -> Tensor:
    """Scale, flip or turn images, or latents.

    Args:
        x: `(B, C, H, W)`.
        geometry: What to do.
        factor: Pixels for each latent along a side: 1 for latents, f for their images.
    """
    if geometry.kind == "flip":
        return x.flip(-1)
    if geometry.kind == "turn":
        return x.rot90(geometry.amount, (-2, -1))
    height, width = x.shape[-2] // factor, x.shape[-1] // factor
    columns = max(round(width * geometry.amount / height), 1)
    return scaled(x, (factor * geometry.amount, factor * columns))


def scaled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by bilinear interpolation, with the wider filter that shrinking needs.

    Two products with matrices instead of `interpolate`, whose backward pass on GPUs adds up in no
    fixed order: a resumed run would not be the same.

    Args:
        x: `(..., H, W)` float.
        size: Height and width to make.

    Returns:
        `(..., *size)` float32 (or float64, if `x` is), whatever autocast computes in.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        rows, columns = (
            _resizing(n, m, x.dtype, x.device) for n, m in zip(x.shape[-2:], size, strict=True)
        )
        return rows @ x @ columns.mT


def mixed(latents: Tensor, noise: Tensor, strength: Tensor, share: Tensor) -> Tensor:
    """(1 - t) z + t g s(z) e, sample by sample.

    s(z) is the standard deviation of a sample's own latents, with its gradient: an encoder gains
    nothing by making its latents larger, and what is done to a sample does not depend on others.

    Args:
        latents: z, `(B, C, h, w)`.
        noise: e, of the same shape, standard normal.
        strength: g, `(B,)`.
        share: t, `(B,)` in [0, 1].
    """
    spread = (latents.flatten(1).var(1, unbiased=False) + _TINY).sqrt()
    share, size = (x.view(-1, 1, 1, 1) for x in (share, share * strength * spread))
    return (1.0 - share) * latents + size * noise


def prefix(latents: Tensor, kept: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` of which each sample keeps its first channels, `kept` of `(B,)`."""
    numbers = torch.arange(latents.shape[1], device=latents.device)
    return latents * (numbers < kept[:, None])[:, :, None, None]


def like(latents: Tensor, noise: Tensor) -> Tensor:
    """As much white noise as there are latents, after they were moved.

    It is turned or cropped, not interpolated: a part of white noise is white noise, and neighbours
    that were averaged are not.
    """
    height, width = latents.shape[-2:]
    if height > noise.shape[-2] or width > noise.shape[-1]:
        noise = noise.mT
    return noise[..., :height, :width]


@functools.lru_cache(maxsize=256)
def _resizing(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What makes m values of n along an axis, as a matrix `(m, n)`."""
    identity = torch.eye(n, dtype=torch.float64)[None, None]
    wanted = F.interpolate(identity, (m, n), mode="bilinear", antialias=True)
    return wanted[0, 0].to(device, dtype)


def check_disturb(config: DisturbConfig, bottleneck: Bottleneck, channels: int) -> None:
    """Whether a first stage can be trained like this.

    Args:
        config: What the recipe wants.
        bottleneck: Of the first stage.
        channels: Of its latents.

    Raises:
        ConfigError: When latents would be decoded that this first stage never has, or more
            channels were to be kept than there are.
    """
    for problem in _problems(config, bottleneck, channels):
        raise ConfigError(problem)


def _problems(config: DisturbConfig, bottleneck: Bottleneck, channels: int) -> Iterator[str]:
    least = config.prefix.channels
    if config.prefix.probability > 0 and least >= channels:
        yield (
            f"disturb.prefix.channels ({least}) is the fewest channels that are kept, but the "
            f"latents have {channels}: nothing would be left out. Lower it, or set "
            "disturb.prefix.probability to 0"
        )
    if not isinstance(bottleneck, Discrete):
        return
    equivariance = config.equivariance
    if equivariance.probability > 0 and "scale" in equivariance.transforms:
        yield (
            "disturb.equivariance.transforms has scale, but between the codes of a codebook there "
            "are none to decode: use flip and turn, which only move them"
        )
    for name, part in (("noise", config.noise), ("prefix", config.prefix)):
        if part.probability > 0:
            yield (
                f"disturb.{name}.probability is {part.probability:g}, but a codebook's latents are "
                "its codes, and what would be decoded is none: set it to 0"
            )
