"""Other image channels, and more latent channels, for a pretrained first stage.

What it does to the channels it had stays as it was at step 0. Of the first and last convolutions
only rows or columns are added, summed or averaged:

    3 -> 1   the first convolution sums over the colors, so a gray image gives the latents of the
             same image as RGB; the last one averages
    3 -> 4   RGBA as AlphaVAE has it: alpha's input weights are 0, its output is opaque (bias 1)
    3 -> n   further input weights are 0, further outputs the mean of the colors
    1 -> n   the first convolution divides over the channels, the last one repeats
"""

from typing import Any

import torch
from torch import Tensor, nn

from first_stage.errors import ConfigError
from first_stage.models.initialization import QUIET_LOGVAR
from first_stage.seeding import Purpose, generator

_COLORS = 3
_CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderKLFlux2")


@torch.no_grad()
def inflate_images(model: Any, channels: int) -> None:
    """Give an autoencoder other image channels, in place.

    Args:
        model: With `encoder.conv_in` and `decoder.conv_out`: AutoencoderKL, VQModel, Flux2.
        channels: How many.

    Raises:
        ConfigError: When the class has no such convolutions, or channels cannot be shared.
    """
    had = int(model.config.in_channels)
    if had == channels:
        return
    first, last = _conv(model, "encoder", "conv_in"), _conv(model, "decoder", "conv_out")
    weight, out, bias = first.weight, last.weight, last.bias
    assert bias is not None  # diffusers' have one
    if channels == 1:
        weight = weight.sum(1, keepdim=True)
        out, bias = out.mean(0, keepdim=True), bias.mean(0, keepdim=True)
    elif had == 1:
        weight = weight.repeat(1, channels, 1, 1) / channels
        out, bias = out.repeat(channels, 1, 1, 1), bias.repeat(channels)
    elif channels > had:
        more = channels - had
        weight = torch.cat([weight, weight.new_zeros(len(weight), more, *weight.shape[2:])], 1)
        if (had, channels) == (_COLORS, _COLORS + 1):
            new, new_bias = torch.zeros_like(out[:1]), torch.ones_like(bias[:1])
        else:
            new, new_bias = out.mean(0, keepdim=True), bias.mean(0, keepdim=True)
        out = torch.cat([out, new.repeat(more, 1, 1, 1)])
        bias = torch.cat([bias, new_bias.repeat(more)])
    else:
        raise ConfigError(
            f"model.in_channels is {channels}, but model.pretrained takes {had} channels: it can "
            f"become 1 or more than {had}"
        )
    _replace(first, weight, first.bias)
    _replace(last, out, bias)
    model.register_to_config(in_channels=channels, out_channels=channels)


@torch.no_grad()
def add_latent_channels(model: Any, more: int) -> None:
    """Give an `AutoencoderKL` further latent channels, in place.

    The old channels' posteriors stay, and so do images: the decoder's weights for the new ones are
    0. Their means are random projections of what the encoder knows, so that both halves have a
    gradient from the second step on.

    Args:
        model: An `AutoencoderKL`.
        more: How many.

    Raises:
        ConfigError: When it is of another class.
    """
    if more == 0:
        return
    if type(model).__name__ != "AutoencoderKL":
        raise ConfigError(
            f"model.more_latent_channels is {more}, but model.pretrained is a "
            f"{type(model).__name__}: only AutoencoderKL takes more"
        )
    had = int(model.config.latent_channels)
    out, first = _conv(model, "encoder", "conv_out"), _conv(model, "decoder", "conv_in")
    means, logvars = out.weight.chunk(2)
    assert out.bias is not None  # diffusers' have one
    draw = generator(0, Purpose.SPLIT, had, more).standard_normal((more, *means.shape[1:]))
    new = torch.from_numpy(draw).to(means) * means.std()
    weight = torch.cat([means, new, logvars, torch.zeros_like(new)])
    bias, log_bias = out.bias.chunk(2)
    zeros = bias.new_zeros(more)
    _replace(out, weight, torch.cat([bias, zeros, log_bias, zeros + QUIET_LOGVAR]))
    columns = first.weight.new_zeros(len(first.weight), more, *first.weight.shape[2:])
    _replace(first, torch.cat([first.weight, columns], 1), first.bias)
    kept = list(range(had))
    if getattr(model, "quant_conv", None) is not None:
        _extend(model.quant_conv, [*kept, *(had + more + k for k in kept)], 2 * (had + more))
    if getattr(model, "post_quant_conv", None) is not None:
        _extend(model.post_quant_conv, kept, had + more)
    model.register_to_config(latent_channels=had + more, latents_mean=None, latents_std=None)


def _conv(model: Any, half: str, name: str) -> nn.Conv2d:
    if type(model).__name__ not in _CLASSES:
        raise ConfigError(
            f"model.inflate_channels is true, but model.pretrained is a {type(model).__name__}: "
            f"channels of {', '.join(_CLASSES)} can be inflated"
        )
    conv: nn.Conv2d = getattr(getattr(model, half), name)
    return conv


def _extend(conv: nn.Conv2d, kept: list[int], size: int) -> None:
    """A 1x1 convolution among more channels: as it was on those kept, identity on the others."""
    weight = torch.eye(size).to(conv.weight)[:, :, None, None].clone()
    bias = conv.weight.new_zeros(size)
    rows = torch.tensor(kept, device=weight.device)
    weight[rows[:, None], rows] = conv.weight
    if conv.bias is not None:
        bias[rows] = conv.bias
    _replace(conv, weight, bias)


def _replace(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    conv.weight = nn.Parameter(weight.detach().clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    conv.out_channels, conv.in_channels = weight.shape[:2]
