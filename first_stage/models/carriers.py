"""Where a diffusers class keeps what pipelines do to its latents: (z - shift) * scaling.

One carrier per way of keeping it; a family names its own. Evaluation and cache read with it, the
export writes with it.
"""

from typing import Any, Protocol


class Carrier(Protocol):
    """Reads and writes the scaling and shift of a diffusers model."""

    carries_shift: bool
    """Whether a shift can be written; without it one has to be folded into the weights."""

    def read(self, model: Any) -> tuple[float, float]:
        """Scaling and shift that the model's pipelines apply; absent or null means 1 and 0."""
        ...

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Keep measured values in the model, so that `save_pretrained` writes them."""
        ...


class ScalingAndShift:
    """`scaling_factor` and `shift_factor` of the config, as in Stable Diffusion 3 and Flux."""

    carries_shift = True

    def read(self, model: Any) -> tuple[float, float]:
        """As the config has them."""
        config = model.config
        return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Into the config."""
        model.register_to_config(scaling_factor=scaling, shift_factor=shift)


class ScalingOnly(ScalingAndShift):
    """`scaling_factor` alone: the class's config has no field for a shift."""

    carries_shift = False

    def write(self, model: Any, scaling: float, shift: float) -> None:
        """Into the config; the shift is not carried."""
        model.register_to_config(scaling_factor=scaling)
