"""Where a diffusers class keeps what pipelines do to its latents: (z - shift) * scaling.

One carrier per way of keeping it; a family names its own. Evaluation and cache read with it, the
export writes with it, and its card says in code what pipelines do.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from first_stage.errors import ConfigError


class Carrier(Protocol):
    """Reads and writes the scaling and shift of a diffusers model."""

    carries_shift: bool
    """Whether a shift can be written; without it one has to be folded into the weights."""
    channels_in: str | None
    """Where each latent channel has its own, in words; `None` where all share one number."""

    def read(self, model: Any) -> tuple[float, float]:
        """Scaling and shift that the model's pipelines apply; absent or null means 1 and 0."""
        ...

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Keep measured values in the model, so that `save_pretrained` writes them."""
        ...

    def write_channels(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep each channel's mean and standard deviation; only where `channels_in` says so."""
        ...

    def usage(self, encoded: str) -> list[str]:
        """Lines of Python that make `latents` of what `encoded` says, and `images` of those."""
        ...


def set_scale(carrier: Carrier, model: Any, scaling: float | None, shift: float | None) -> None:
    """Write what a user says of a model's latents, where its file does not.

    Args:
        carrier: Of its family.
        model: The model.
        scaling: `None`: as the model says.
        shift: `None`: as the model says.

    Raises:
        ConfigError: When the model keeps each channel's own, or has no place for a shift.
    """
    if scaling is None and shift is None:
        return
    name = "scaling_factor" if scaling is not None else "shift_factor"
    given = scaling if scaling is not None else shift
    if carrier.channels_in is not None:
        raise ConfigError(
            f"{name} is {given}, but {type(model).__name__} keeps what each channel has, in "
            f"{carrier.channels_in.replace('`', '')}: leave it out"
        )
    if shift and not carrier.carries_shift:
        raise ConfigError(
            f"shift_factor is {shift}, but the config of {type(model).__name__} has no place for "
            "one: leave it out"
        )
    known = carrier.read(model)
    carrier.write(
        model, known[0] if scaling is None else scaling, known[1] if shift is None else shift
    )


class ScalingAndShift:
    """`scaling_factor` and `shift_factor` of the config, as in Stable Diffusion 3 and Flux."""

    carries_shift = True
    channels_in: str | None = None

    def read(self, model: Any) -> tuple[float, float]:
        """As the config has them."""
        config = model.config
        return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Into the config."""
        model.register_to_config(scaling_factor=scaling, shift_factor=shift)

    def write_channels(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        """There is no place for them."""
        raise NotImplementedError(f"{type(model).__name__} has one scaling_factor for all channels")

    def usage(self, encoded: str) -> list[str]:
        """Both of the config."""
        return [
            f"latents = ({encoded} - vae.config.shift_factor) * vae.config.scaling_factor",
            "images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)"
            ".sample",
        ]


class ScalingOnly(ScalingAndShift):
    """`scaling_factor` alone: the class's config has no field for a shift."""

    carries_shift = False

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Into the config; the shift is not carried."""
        model.register_to_config(scaling_factor=scaling)

    def usage(self, encoded: str) -> list[str]:
        """The scaling of the config."""
        return [
            f"latents = {encoded} * vae.config.scaling_factor",
            "images = vae.decode(latents / vae.config.scaling_factor).sample",
        ]


class MeanAndStd:
    """`latents_mean` and `latents_std` of the config, a number for each channel (Wan, Qwen-Image).

    Read as one number they are what all channels together have.
    """

    carries_shift = True
    channels_in: str | None = "`latents_mean` and `latents_std` of its config"

    def read(self, model: Any) -> tuple[float, float]:
        """One over the root of the mean variance, and the mean: of all channels together."""
        mean, std = model.config.latents_mean, model.config.latents_std
        shift = sum(mean) / len(mean)
        spread = [s * s + (m - shift) ** 2 for m, s in zip(mean, std, strict=True)]
        return float((sum(spread) / len(spread)) ** -0.5), float(shift)

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """The same for every channel; lists that say this already stay as they are."""
        if self.read(model) != (scaling, shift):
            channels = len(model.config.latents_mean)
            self.write_channels(model, [shift] * channels, [1.0 / scaling] * channels)

    def write_channels(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        """Into the config."""
        model.register_to_config(latents_mean=list(mean), latents_std=list(std))

    def usage(self, encoded: str) -> list[str]:
        """Both lists, over one frame."""
        lists = '("latents_mean", "latents_std")'
        return [
            "mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in",
            f"             {lists})",
            f"latents = ({encoded} - mean) / std  # of one frame: (B, C, 1, h, w)",
            "images = vae.decode(latents * std + mean).sample[:, :, 0]",
        ]
