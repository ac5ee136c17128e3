"""Tiny real autoencoders of several diffusers classes, for tests."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image

import first_stage.models.first_stage  # noqa: F401  # families register themselves
from first_stage.config.schema import ModelConfig
from first_stage.models.families import family_named


def build_autoencoder(
    in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups,
    mid_block_attention, quant_conv, sample_size,
) -> AutoencoderKL:  # fmt: skip
    """An `AutoencoderKL` as the trainer builds it."""
    layout = ModelConfig(
        in_channels=in_channels, latent_channels=latent_channels,
        block_out_channels=block_out_channels, layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups, mid_block_attention=mid_block_attention,
        quant_conv=quant_conv,
    )  # fmt: skip
    return family_named("kl").build(layout, sample_size)


def tiny_kl(
    in_channels: int = 3, latent_channels: int = 4, levels: int = 2, attention: bool = False
) -> AutoencoderKL:
    torch.manual_seed(0)
    widths = (8, 16, 16)[:levels]
    return build_autoencoder(in_channels, latent_channels, widths, 1, 4, attention, True, 16).eval()


def tiny_vq(codes: int = 16) -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=3,
        num_vq_embeddings=codes,
        norm_num_groups=4,
    ).eval()


def tiny_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def tiny_dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()


def pictures_in(parent: Path, count: int) -> Path:
    """A folder of small pictures of different sizes, even and odd."""
    folder = parent / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        size = (17 + 3 * (k % 3), 16 + 2 * (k % 2))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = smooth + draw.normal(0, 10, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{k:02d}.png")
    return folder
