"""`AutoencoderKLFlux2`, whose pipelines read the latents' statistics from batch-norm buffers."""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2

from first_stage.config.schema import ModelConfig
from first_stage.errors import ConfigError
from first_stage.models.built_in import KL
from first_stage.models.families import register_family


class BatchNormBuffers:
    """Running mean and variance over latents in patches of 2x2, for each place of a patch."""

    carries_shift = True

    def read(self, model: Any) -> tuple[float, float]:
        """One over the root of the mean variance, and the mean: of all channels together.

        Pipelines use each channel's own; these are what the same buffers are as one number.
        """
        mean, variance = model.bn.running_mean.double(), model.bn.running_var.double()
        total = (variance + (mean - mean.mean()).square()).mean() + model.config.batch_norm_eps
        return 1.0 / float(total.sqrt()), float(mean.mean())

    @torch.no_grad()
    def write(self, model: Any, scaling: float, shift: float) -> None:
        """The same for every channel; buffers that say this already stay as they are."""
        known = self.read(model)
        if known == (scaling, shift):
            return
        model.bn.running_mean.fill_(shift)
        model.bn.running_var.fill_(max(1.0 / scaling**2 - model.config.batch_norm_eps, 0.0))


class Flux2(KL):
    """`AutoencoderKLFlux2`: 32 latent channels, and a decoder that may be narrower."""

    name = "flux2"
    model_class = AutoencoderKLFlux2
    carrier = BatchNormBuffers()

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Only pretrained ones are trained: the class adds nothing to `AutoencoderKL`'s layout."""
        raise ConfigError(
            "model.family is flux2, which is trained from a pretrained one: give model.pretrained, "
            "or train a new one as family kl with model.latent_channels 32"
        )


register_family(Flux2())
