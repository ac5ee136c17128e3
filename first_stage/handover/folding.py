"""Folding the latents' statistics into the 1x1 convolutions around them.

With per-channel mean m and standard deviation s of the latents, z' = (z - m) / s is an affine map
per channel, and so are the two 1x1 convolutions between which z lies: `quant_conv` puts out the
posterior's mean and log-variance, `post_quant_conv` takes z. Folding the map into the one and its
inverse into the other gives an autoencoder with the same reconstructions whose raw latents are
centred with unit variance per channel. `scaling_factor` is then 1 and there is no shift, so that no
pipeline can forget one.

A codebook takes part in the map: its codes move with the latents. They stay the nearest ones only
while all channels are divided by the same number, so a codebook takes one standard deviation.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from first_stage.errors import UserError
from first_stage.models.bottlenecks import LOGVAR_MAX, LOGVAR_MIN
from first_stage.models.padding import FIELD as PADDING
from first_stage.models.padding import padding_of, set_padding


@torch.no_grad()
def fold_statistics(
    autoencoder: AutoencoderKL | VQModel, mean: Sequence[float], std: Sequence[float]
) -> AutoencoderKL | VQModel:
    """An autoencoder whose raw latents are (z - mean) / std.

    A posterior N(mu, sigma^2) becomes N((mu - mean) / std, sigma^2 / std^2): the rows of the means
    are shifted and divided, the rows of the log-variances get -2 log(std) added to their bias.
    An autoencoder without the 1x1 convolutions gets identity ones first. Where a log-variance is
    clamped (below -30 or above 20) it stays at the clamp, which no real posterior meets.

    Args:
        autoencoder: The autoencoder; it is not changed.
        mean: Mean of the latents, per channel.
        std: Standard deviation of the latents, per channel; above 0. The same in all channels for a
            codebook: see `common_deviation`.

    Returns:
        A copy with the statistics folded in; its config says scaling 1 and shift 0.

    Raises:
        UserError: When the statistics do not fit the latents, the autoencoder's latents do not come
            out of a 1x1 convolution, or a codebook is to be scaled differently along its axes.
    """
    if isinstance(autoencoder, VQModel):
        return _fold_codebook(autoencoder, mean, std)
    if not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            "statistics fold into the 1x1 convolutions of an AutoencoderKL or a VQModel; this is a "
            f"{type(autoencoder).__name__}, which has none: use its scaling_factor"
        )
    channels = autoencoder.config.latent_channels
    _check(mean, std, channels)
    folded = with_convolutions(autoencoder)
    shift = torch.tensor(mean, dtype=torch.float64)
    scale = torch.tensor(std, dtype=torch.float64)

    to_moments = folded.quant_conv
    rows = torch.cat([1.0 / scale, torch.ones_like(scale)])
    offset = torch.cat([-shift / scale, -2.0 * scale.log()])
    store(to_moments.weight, to_moments.weight.double().cpu() * rows[:, None, None, None])
    store(to_moments.bias, to_moments.bias.double().cpu() * rows + offset)

    _unfold(folded.post_quant_conv, shift, scale)

    folded.register_to_config(
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=None,  # by now 0 and 1, which a config need not say
        latents_std=None,
    )
    return folded


def common_deviation(std: Sequence[float]) -> list[float]:
    """One standard deviation for all channels: the root of their mean square, for a codebook."""
    return [math.sqrt(sum(s * s for s in std) / len(std))] * len(std)


def _fold_codebook(model: VQModel, mean: Sequence[float], std: Sequence[float]) -> VQModel:
    """Latents and codes become (z - mean) / std alike, with one std: the same codes are nearest."""
    _check(mean, std, model.quantize.embedding.weight.shape[1])
    if model.config.norm_type == "spatial":
        raise UserError(
            "this VQModel's decoder reads its codes in every normalization (norm_type spatial), so "
            "nothing can be folded into them: use its scaling_factor"
        )
    if max(std) > min(std):
        raise UserError(
            "a codebook's latents take one standard deviation for all channels, not "
            f"{min(std):.4g} to {max(std):.4g}: scaling them apart changes which code is nearest, "
            "and with it the images. A shift per channel and a common scale can be folded"
        )
    folded = copy.deepcopy(model)
    shift, scale = torch.tensor(mean, dtype=torch.float64), float(std[0])
    to_latents, codes = folded.quant_conv, folded.quantize.embedding.weight
    store(to_latents.weight, to_latents.weight.double().cpu() / scale)
    store(to_latents.bias, (to_latents.bias.double().cpu() - shift) / scale)
    store(codes, (codes.double().cpu() - shift) / scale)
    _unfold(folded.post_quant_conv, shift, torch.full_like(shift, scale))
    folded.register_to_config(scaling_factor=1.0)
    return folded


def _unfold(from_latents: nn.Conv2d, shift: Tensor, scale: Tensor) -> None:
    """Let a 1x1 convolution take (z - shift) / scale where it took z."""
    weight = from_latents.weight.double().cpu()
    assert from_latents.bias is not None  # diffusers' 1x1 convolutions have a bias
    store(from_latents.bias, from_latents.bias.double().cpu() + weight[:, :, 0, 0] @ shift)
    store(from_latents.weight, weight * scale[None, :, None, None])


def _check(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"the statistics have {len(mean)} means and {len(std)} standard deviations; the "
            f"autoencoder has {channels} latent channels"
        )
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        if not (math.isfinite(m) and math.isfinite(s) and s > 0):
            raise UserError(
                f"latent channel {channel} has mean {m} and standard deviation {s}: a channel that "
                "never varies, or is not finite, cannot be given unit variance"
            )
        if not LOGVAR_MIN < 2 * math.log(s) < LOGVAR_MAX:
            raise UserError(
                f"latent channel {channel} has standard deviation {s}: folded log-variances would "
                "be clamped"
            )


def rebuilt(autoencoder: AutoencoderKL, **changes: Any) -> AutoencoderKL:
    """An autoencoder of another layout, in float32, with the weights whose shapes stayed.

    Args:
        autoencoder: The autoencoder; it is not changed.
        changes: Fields of its config.
    """
    config = {**autoencoder.config, **changes}
    config.pop("_use_default_values", None)  # fields that `from_config` would set back
    config.pop(PADDING, None)  # it has no such field
    result = AutoencoderKL.from_config(config)
    shapes = {name: value.shape for name, value in result.state_dict().items()}
    weights = autoencoder.state_dict()
    stayed = {name: value for name, value in weights.items() if shapes.get(name) == value.shape}
    result.load_state_dict(stayed, strict=False)
    set_padding(result, padding_of(autoencoder))
    return result


def with_convolutions(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """A copy that has both 1x1 convolutions; the ones it lacked do nothing."""
    if autoencoder.quant_conv is not None and autoencoder.post_quant_conv is not None:
        return copy.deepcopy(autoencoder)
    channels = autoencoder.config.latent_channels
    reference = autoencoder.encoder.conv_out.weight
    result = rebuilt(autoencoder, use_quant_conv=True, use_post_quant_conv=True)
    for present, name, width in (
        (autoencoder.quant_conv, "quant_conv", 2 * channels),
        (autoencoder.post_quant_conv, "post_quant_conv", channels),
    ):
        if present is None:
            convolution: nn.Conv2d = getattr(result, name)
            store(convolution.weight, torch.eye(width)[:, :, None, None])
            store(convolution.bias, torch.zeros(width))
    return result.to(reference.device, reference.dtype).train(autoencoder.training)


def store(parameter: Tensor | None, value: Tensor) -> None:
    """Give a parameter new values, in its own type and place."""
    assert parameter is not None  # diffusers' 1x1 convolutions have a bias
    parameter.copy_(value.to(parameter))
