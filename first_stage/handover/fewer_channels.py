"""A first stage with the first of its latent channels alone, for a smaller diffusion model.

What it decodes is what the whole one makes of the same latents with zeros in the channels behind:
what a decoder that was trained with prefix masks (`disturb.prefix`; Chen et al. 2025, "DC-AE 1.5",
section 3.2) has seen, and after whitening, which puts the most signal first, the mean.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from first_stage.errors import UserError
from first_stage.handover.folding import rebuilt, store


@torch.no_grad()
def keep_channels(autoencoder: Any, count: int) -> AutoencoderKL:
    """An autoencoder whose latents are the first channels of another's.

    The 1x1 convolutions around the latents take as many channels as there are, so they go into the
    convolutions beside them. Posteriors are the same. So are images, but for one thing: the bias
    of `post_quant_conv` was zero outside of the image, where the next convolution looks, and what
    of it the kept channels cannot express counts there too now. This moves the outermost row of
    latents: digits of 4 x 4 latents by 0.2 dB at most. Without such a bias, or where the decoder
    pads by reflection, images are the same.

    Args:
        autoencoder: An `AutoencoderKL`; it is not changed.
        count: How many channels are kept.

    Returns:
        The smaller autoencoder, in float32. `latents_mean` and `latents_std` of its config are
        those kept; `scaling_factor` and `shift_factor` are as they were.

    Raises:
        UserError: When it is of another class, or has not more channels than that.
    """
    if not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            f"keep_channels leaves channels of an AutoencoderKL out; this is a "
            f"{type(autoencoder).__name__}"
        )
    had = int(autoencoder.config.latent_channels)
    if not 0 < count < had:
        raise UserError(f"keep_channels is {count}; there are {had}: keep from 1 to {had - 1}")
    kept_lists = {
        name: list(autoencoder.config[name])[:count]
        for name in ("latents_mean", "latents_std")
        if autoencoder.config.get(name) is not None
    }
    result = rebuilt(autoencoder, latent_channels=count, **kept_lists)

    last, to_moments = autoencoder.encoder.conv_out, autoencoder.quant_conv
    weight, bias = last.weight.double(), _bias(last)
    if to_moments is not None:
        rows = to_moments.weight.double()[:, :, 0, 0]
        weight = torch.einsum("ij,jkhw->ikhw", rows, weight)
        bias = rows @ bias + _bias(to_moments)
    kept = [*range(count), *range(had, had + count)]  # of the means, and of the log-variances
    store(result.encoder.conv_out.weight, weight[kept])
    store(result.encoder.conv_out.bias, bias[kept])
    if to_moments is not None:
        _pass_on(result.quant_conv, weight.new_zeros(2 * count))

    first, from_latents = autoencoder.decoder.conv_in, autoencoder.post_quant_conv
    weight, bias = first.weight.double(), _bias(first)
    if from_latents is None:
        weight = weight[:, :count]
    else:
        columns = from_latents.weight.double()[:, :count, 0, 0]
        inside = torch.linalg.lstsq(columns, _bias(from_latents)[:, None]).solution[:, 0]
        left = _bias(from_latents) - columns @ inside
        _pass_on(result.post_quant_conv, inside)
        bias = bias + torch.einsum("ijhw,j->i", weight, left)
        weight = torch.einsum("ijhw,jk->ikhw", weight, columns)
    store(result.decoder.conv_in.weight, weight)
    store(result.decoder.conv_in.bias, bias)
    return result.to(last.weight.device).train(autoencoder.training)


def _bias(convolution: Any) -> Tensor:
    bias: Tensor = convolution.bias
    return bias.double()


def _pass_on(convolution: Any, bias: Tensor) -> None:
    """A 1x1 convolution that only adds."""
    store(convolution.weight, torch.eye(len(bias))[:, :, None, None])
    store(convolution.bias, bias)
