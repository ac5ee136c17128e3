"""Which parts of a first stage learn: `train.parts`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from first_stage.config.schema import Part
from first_stage.errors import ConfigError
from first_stage.models.first_stage import FirstStage


def select_parts(stage: FirstStage, parts: Sequence[Part]) -> None:
    """Let only these parts of a first stage ask for a gradient.

    Args:
        stage: The first stage, before an optimizer is made for it.
        parts: Several add up.

    Raises:
        ConfigError: When the class has no such part.
    """
    if "all" in parts:
        return
    encoder = stage.family.encoder_parts(stage.model)
    of_encoder = {id(p) for module in (*encoder, stage.bottleneck) for p in module.parameters()}
    wanted: set[int] = set()
    for part in parts:
        if part == "encoder":
            wanted |= of_encoder
        elif part == "decoder":
            wanted |= {id(p) for p in stage.parameters() if id(p) not in of_encoder}
        else:
            modules = _modules(stage, part)
            wanted |= {id(p) for module in modules for p in module.parameters()}
    if not wanted & of_encoder:
        stage.freeze_encoder()
    for parameter in stage.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in wanted)
    for module in stage.modules():
        if isinstance(module, nn.GroupNorm) and module.weight.requires_grad:
            module.register_forward_pre_hook(_with_input_gradient)


def _with_input_gradient(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ask for the gradient of a norm's input, also where nothing before it learns.

    torch 2's backward of a group norm on channels-last images ends in a segmentation fault on CPUs
    where its weights need a gradient and its input does not.
    """
    (images,) = inputs
    if torch.is_grad_enabled() and not images.requires_grad:
        return (images.detach().requires_grad_(),)
    return inputs


def _modules(stage: FirstStage, part: str) -> list[nn.Module]:
    decoder: Any = getattr(stage.model, "decoder", None)
    try:
        if part == "mid":
            return [decoder.mid_block]
        if part == "last_block":
            norm = getattr(decoder, "conv_norm_out", None) or decoder.norm_out
            return [decoder.up_blocks[-1], norm, decoder.conv_out]
        return [decoder.conv_out if part == "conv_out" else stage.model.encoder.conv_in]
    except AttributeError as error:
        raise ConfigError(
            f"train.parts names {part}, which {type(stage.model).__name__} does not have: use all, "
            "encoder or decoder"
        ) from error
