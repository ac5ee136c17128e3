"""What is done to latents between bottleneck and decoder in training: its part of the recipe.

Every field's docstring is its `--help` text.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from first_stage.config.types import PositiveFloat, PositiveInt, Share

Transform = Literal["scale", "flip", "turn"]

if TYPE_CHECKING:
    Scale = float
else:
    from first_stage.config.types import number

    Scale = number(float, "up to 0.9, above 0", (">", 0), ("<=", 0.9))


@dataclass(frozen=True)
class EquivarianceConfig:
    """Decode changed latents against images that were changed alike: like small images.

    EQ-VAE, Kouzelis et al. 2025.
    """

    probability: Share = 0.0
    """Share of the steps that do so; 0: off, 0.5 in the paper. The others train as usual."""
    transforms: tuple[Transform, ...] = ("scale",)
    """One of these is drawn for a step: scale (make smaller), flip (left to right), turn (by 90,
    180 or 270 degrees)."""
    least_scale: Scale = 0.25
    """The smallest size that scale draws, against the full one."""


@dataclass(frozen=True)
class LatentNoiseConfig:
    """Decode latents that were mixed with noise: the decoder forgives a diffusion model's errors.

    l-DeTok, Yang et al. 2025.
    """

    probability: Share = 0.0
    """Share of the samples whose latents get noise; 0: off, 1 in the paper."""
    strength: PositiveFloat = 1.0
    """Standard deviation of the noise where it replaces the latents, against that of the sample's
    own latents; how much of them it replaces is drawn evenly from 0 to 1. 3 in the paper, whose
    decoder then learns alone (train.encoder_steps)."""


@dataclass(frozen=True)
class PrefixConfig:
    """Decode the first channels alone: they carry the most, and a diffusion model may use fewer.

    DC-AE 1.5, Chen et al. 2025.
    """

    probability: Share = 0.0
    """Share of the samples whose later channels are set to 0; 0: off."""
    channels: PositiveInt = 4
    """The fewest channels that are kept; how many is drawn evenly from this up to all."""


@dataclass(frozen=True)
class DisturbConfig:
    """Changes of latents before they are decoded, for latents that diffusion models learn easily.

    Only in training, and only while the encoder learns.
    """

    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    noise: LatentNoiseConfig = field(default_factory=LatentNoiseConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)

    @property
    def in_use(self) -> bool:
        """Whether anything is ever changed."""
        return max(p.probability for p in (self.equivariance, self.noise, self.prefix)) > 0

    @property
    def draws_for_samples(self) -> bool:
        """Whether anything is drawn for each sample, not only for a step."""
        return max(self.noise.probability, self.prefix.probability) > 0
