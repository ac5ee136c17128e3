"""`AutoencoderKLFlux2`, whose pipelines read the latents' statistics from batch-norm buffers.

A run that trains the decoder alone keeps them, one that trains the encoder measures them anew.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2

from first_stage.config.schema import ModelConfig
from first_stage.models.built_in import KL
from first_stage.models.families import only_pretrained, register_family


class BatchNormBuffers:
    """Running mean and variance over latents in patches of 2x2, for each place of a patch."""

    carries_shift = True
    channels_in: str | None = "the running mean and variance of its batch norm"

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
        if self.read(model) == (scaling, shift):
            return
        channels = int(model.config.latent_channels)
        self.write_channels(model, [shift] * channels, [1.0 / scaling] * channels)

    @torch.no_grad()
    def write_channels(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        """Each channel's own at all four places of a patch, which see the same images.

        Pipelines add the norm's epsilon to the variance again.
        """
        places = math.prod(model.config.patch_size)
        variance = torch.tensor(std, dtype=torch.float64).square() - model.config.batch_norm_eps
        means = torch.tensor(mean, dtype=torch.float64)
        model.bn.running_mean.copy_(means.repeat_interleave(places))
        model.bn.running_var.copy_(variance.clamp_min(0.0).repeat_interleave(places))

    def usage(self, encoded: str) -> list[str]:
        """The buffers, over latents in patches."""
        return [
            "mean = vae.bn.running_mean.view(1, -1, 1, 1)",
            "std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)",
            f"patches = torch.nn.functional.pixel_unshuffle({encoded}, 2)",
            "latents = (patches - mean) / std",
            "raw = torch.nn.functional.pixel_shuffle(latents * std + mean, 2)",
            "images = vae.decode(raw).sample",
        ]


class Flux2(KL):
    """`AutoencoderKLFlux2`: 32 latent channels, and a decoder that may be narrower."""

    name = "flux2"
    model_class = AutoencoderKLFlux2
    carrier = BatchNormBuffers()

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Only pretrained ones are trained: the class adds nothing to `AutoencoderKL`'s layout."""
        raise only_pretrained(self, "train a new one as family kl with model.latent_channels 32")


register_family(Flux2())
