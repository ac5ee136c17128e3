"""The shapes of public first stages with random weights, whole and in small."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, VQModel
from torch import nn


def _kinds(widths: Sequence[int], attended: Sequence[int]) -> dict[str, Any]:
    levels = range(len(widths))
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(
            f"{'Attn' * (level in attended)}DownEncoderBlock2D" for level in levels
        ),
        "up_block_types": tuple(
            f"{'Attn' * (level in attended)}UpDecoderBlock2D" for level in reversed(levels)
        ),
        "layers_per_block": 2,
    }


_PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
SHAPES: dict[str, tuple[type, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "sd": (AutoencoderKL, (128, 256, 512, 512), (), {"latent_channels": 4}),
    "flux": (AutoencoderKL, (128, 256, 512, 512), (), {"latent_channels": 16, **_PLAIN}),
    "kl_f4": (AutoencoderKL, (128, 256, 512), (), {"latent_channels": 3}),
    "kl_f16": (AutoencoderKL, (128, 128, 256, 256, 512), (4,), {"latent_channels": 16}),
    "vq_f4": (VQModel, (128, 256, 512), (), {"latent_channels": 3, "num_vq_embeddings": 8192}),
    "vq_f8": (VQModel, (128, 256, 256, 512), (3,),
              {"latent_channels": 4, "num_vq_embeddings": 16384}),
    "vq_f16": (VQModel, (128, 128, 256, 256, 512), (4,),
               {"latent_channels": 8, "num_vq_embeddings": 16384}),
    "flux2": (AutoencoderKLFlux2, (128, 256, 512, 512), (), {"latent_channels": 32}),
    "flux2_small": (AutoencoderKLFlux2, (128, 256, 512, 512), (),
                    {"latent_channels": 32, "decoder_block_out_channels": (96, 192, 384, 384)}),
    "tiny": (AutoencoderTiny, (), (), {"latent_channels": 4}),
}  # fmt: skip
"""Class, widths, levels with attention, and the rest. Stable Diffusion 3 has Flux's shapes, XL has
those of Stable Diffusion 1.x."""


def public_autoencoder(name: str, small: bool = True) -> nn.Module:
    """One of `SHAPES` with random weights; `small`: a quarter of the widths, few codes."""
    torch.manual_seed(0)
    cls, widths, attended, more = SHAPES[name]
    more = dict(more)
    if cls is AutoencoderTiny:
        blocks = (1, 2, 2) if small else (1, 3, 3, 3)
        sides = {"encoder_block_out_channels": (16 if small else 64,) * len(blocks)}
        sides["decoder_block_out_channels"] = sides["encoder_block_out_channels"]
        return cls(
            **sides, num_encoder_blocks=blocks, num_decoder_blocks=blocks[::-1], **more
        ).eval()
    if small:
        widths = tuple(width // 4 for width in widths)
        if "num_vq_embeddings" in more:
            more["num_vq_embeddings"] = 16
        if "decoder_block_out_channels" in more:
            more["decoder_block_out_channels"] = (32, 32, 64, 64)
    model = cls(**_kinds(widths, attended), **more).eval()
    if cls is AutoencoderKLFlux2:
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return model
