"""Public first stages beside `public_shapes`, with random weights: whole and in small."""

from typing import Any

import diffusers
import torch
from torch import nn

_HUNYUAN = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "sample_size": 384,
            "downsample_match_channel": True, "upsample_match_channel": True}  # fmt: skip
_ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_down_block": 2,
}
_WAN_22 = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
           "scale_factor_spatial": 16, "temperal_downsample": [False, True, True]}  # fmt: skip
_DC = {"attention_head_dim": 32, "downsample_block_type": "Conv",
       "upsample_block_type": "interpolate"}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hunyuan_image": (
        "AutoencoderKLHunyuanImage",
        {**_HUNYUAN, "latent_channels": 64, "block_out_channels": (128, 256, 512, 512, 1024, 1024),
         "spatial_compression_ratio": 32, "scaling_factor": 0.75289},
        {**_HUNYUAN, "latent_channels": 16, "block_out_channels": (32, 32, 64),
         "spatial_compression_ratio": 4, "scaling_factor": 0.75289},
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {**_ASYMMETRIC, "down_block_out_channels": (128, 256, 512, 512),
         "up_block_out_channels": (192, 384, 768, 768), "layers_per_up_block": 3},
        {**_ASYMMETRIC, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "down_block_out_channels": (8, 16),
         "up_block_out_channels": (16, 16), "layers_per_up_block": 2, "norm_num_groups": 4},
    ),
    "qwen_image": (
        "AutoencoderKLQwenImage",
        {},
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
         "temperal_downsample": [False, True], "latents_mean": [0.5, -1.0, 0.1, 2.0],
         "latents_std": [1.0, 2.0, 3.0, 1.5]},
    ),
    "wan": (
        "AutoencoderKLWan",
        {},
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
         "temperal_downsample": [False, True], "scale_factor_spatial": 4,
         "latents_mean": [0.5, -1.0, 0.1, 2.0], "latents_std": [1.0, 2.0, 3.0, 1.5]},
    ),
    "wan_22": (
        "AutoencoderKLWan",
        {**_WAN_22, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48,
         "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
        {**_WAN_22, "base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "dim_mult": [1, 2, 2],
         "num_res_blocks": 1, "temperal_downsample": [False, True], "scale_factor_spatial": 8,
         "latents_mean": [0.5, -1.0, 0.1, 2.0], "latents_std": [1.0, 2.0, 3.0, 1.5]},
    ),
}  # fmt: skip
"""Class, its arguments as published, and small ones of the same kind."""


def _levels(plain: int, deep: int) -> dict[str, Any]:
    """Block types and kernel sizes of DC-AE: residual levels, then ones with attention."""
    kinds = ("ResBlock",) * plain + ("EfficientViTBlock",) * deep
    return {"encoder_block_types": kinds, "decoder_block_types": kinds}


WHOLE: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "asymmetric_1.5": ("AsymmetricAutoencoderKL", FAMILIES["asymmetric"][1], (8, 4)),
    "asymmetric_2": (
        "AsymmetricAutoencoderKL",
        {**FAMILIES["asymmetric"][1], "up_block_out_channels": (256, 512, 1024, 1024),
         "layers_per_up_block": 5}, (8, 4),
    ),
    "hunyuan_image": ("AutoencoderKLHunyuanImage", FAMILIES["hunyuan_image"][1], (32, 64)),
    "qwen_image": ("AutoencoderKLQwenImage", {}, (8, 16)),
    "wan_2.1": ("AutoencoderKLWan", {}, (8, 16)),
    "wan_2.2": ("AutoencoderKLWan", FAMILIES["wan_22"][1], (16, 48)),
    "dc_f32c32_sana": (
        "AutoencoderDC",
        {**_DC, **_levels(3, 3), "latent_channels": 32, "scaling_factor": 0.41407,
         "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
         "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
         "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
         "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
         "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
         "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,))}, (32, 32),
    ),
    "dc_f64c128_in": (
        "AutoencoderDC",
        {"attention_head_dim": 32, **_levels(3, 4), "latent_channels": 128,
         "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
         "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
         "encoder_layers_per_block": (0, 4, 8, 2, 2, 2, 2),
         "decoder_layers_per_block": (0, 5, 10, 2, 2, 2, 2),
         "encoder_qkv_multiscales": ((),) * 7, "decoder_qkv_multiscales": ((),) * 7,
         "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 4,
         "decoder_act_fns": ("relu",) * 3 + ("silu",) * 4}, (64, 128),
    ),
}  # fmt: skip
"""Class, arguments as published, and what it makes of images: downsample factor and channels.
DC-AE's are those of diffusers' `scripts/convert_dcae_to_diffusers.py`."""


def whole_family(name: str, device: str = "cpu") -> nn.Module:
    """One of `WHOLE`, with random weights (on `meta`: with none)."""
    torch.manual_seed(0)
    kind, fields, _ = WHOLE[name]
    with torch.device(device):
        return getattr(diffusers, kind)(**fields).eval()


def public_family(name: str, small: bool = True) -> nn.Module:
    """One of `FAMILIES` with random weights."""
    torch.manual_seed(0)
    kind, whole, little = FAMILIES[name]
    return getattr(diffusers, kind)(**(little if small else whole)).eval()
