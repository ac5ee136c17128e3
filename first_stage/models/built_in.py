"""The families that the toolkit comes with: one class for each diffusers autoencoder it trains.

kl      AutoencoderKL     Gaussian posterior (Stable Diffusion, SDXL, SD3, Flux)
vq      VQModel           learned codebook (VQGAN, latent diffusion's vq-f4 to vq-f16)
fsq     VQModel           finite grid, carried by the same class as a fixed codebook
dc      AutoencoderDC     deep compression, f32 and more, plain latents (SANA)
tiny    AutoencoderTiny   small and fast, plain latents (TAESD)
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor

from first_stage.config.schema import ModelConfig
from first_stage.config.sections import section
from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.errors import ConfigError
from first_stage.models.bottlenecks import Bottleneck, Gaussian, Plain
from first_stage.models.carriers import ScalingOnly
from first_stage.models.codebooks import Codebook, CodebookConfig, LinearCodebook
from first_stage.models.families import Family, register_family
from first_stage.models.grids import FiniteGrid, GridConfig
from first_stage.models.initialization import quiet_posterior


class KL(Family):
    """`AutoencoderKL`: the first stage of Stable Diffusion (Rombach et al. 2022)."""

    name = "kl"
    model_class = AutoencoderKL
    encoded_as = "latent_dist.sample()"

    def build(self, config: ModelConfig, sample_size: int) -> AutoencoderKL:
        """Levels of residual blocks, each but the last followed by a halving."""
        return AutoencoderKL(
            **_blocks(config, sample_size),
            latent_channels=config.latent_channels,
            # Until an export measures them, the latents are handed over as they are.
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=config.quant_conv,
            use_post_quant_conv=config.quant_conv,
        )

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """A Gaussian posterior."""
        return Gaussian()

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """The moments `(B, 2C, h, w)`: mean and log-variance, not clamped."""
        return model.encode(images, return_dict=False)[0].parameters

    def downsample_factor(self, model: Any) -> int:
        """Each level but the last halves."""
        return int(2 ** (len(model.config.block_out_channels) - 1))

    def begin_quietly(self, model: Any) -> None:
        """With little noise in the latents, too."""
        super().begin_quietly(model)
        quiet_posterior(model.quant_conv or model.encoder.conv_out)

    def layout(self, model: Any) -> dict[str, Any]:
        """All that `build` asks for."""
        return {**_layout(model.config), "quant_conv": model.config.get("use_quant_conv", True)}

    def last_layer(self, model: Any) -> Tensor:
        """Of the decoder's `conv_out`."""
        return model.decoder.conv_out.weight


class VQ(Family):
    """`VQModel` with a learned codebook: VQGAN (Esser et al. 2021)."""

    name = "vq"
    model_class = VQModel
    section = CodebookConfig
    carrier = ScalingOnly()
    encoded_as = "latents"
    checkpointing_problem = "diffusers has no gradient checkpointing for VQModel"

    def build(self, config: ModelConfig, sample_size: int) -> VQModel:
        """As `AutoencoderKL`, with a codebook of `model.vq.codes` of `model.latent_channels`."""
        codes = section(config, self.name, CodebookConfig).codes
        return self._model(config, sample_size, codes, config.latent_channels)

    def _model(self, config: ModelConfig, sample_size: int, codes: int, dimensions: int) -> VQModel:
        return VQModel(
            **_blocks(config, sample_size),
            latent_channels=dimensions,
            vq_embed_dim=dimensions,
            num_vq_embeddings=codes,
            scaling_factor=1.0,  # its default is Stable Diffusion's
        )

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """A codebook: a new one where a run starts from nothing, else the model's own."""
        embedding = model.quantize.embedding.weight
        codes, dimensions = embedding.shape
        if config is None:
            return Codebook(codes, dimensions, table=embedding.detach())
        # The codes that learn are the bottleneck's; these take them up when the model is saved.
        embedding.requires_grad_(False)
        options: CodebookConfig = section(config, "vq", CodebookConfig)
        rule = options.rule or ("linear" if codes > _MANY_CODES else "euclidean")
        table = None if config.pretrained is None else embedding.detach()
        if rule == "linear":
            return LinearCodebook(codes, dimensions, options.gradient, table)
        return Codebook(codes, dimensions, rule, options.gradient, options.restart_after, table)

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """The vectors `(B, D, h, w)` before quantization."""
        return model.encode(images, return_dict=False)[0]

    def to_images(self, model: Any, latents: Tensor) -> Tensor:
        """From latents that the bottleneck has quantized: the stock class need not do it again."""
        # What `decode` does after quantizing; it takes latents for tokens where the config says
        # `lookup_from_codebook`.
        spatial = latents if model.config.norm_type == "spatial" else None
        return model.decoder(model.post_quant_conv(latents), spatial)

    def downsample_factor(self, model: Any) -> int:
        """Each level but the last halves."""
        return int(2 ** (len(model.config.block_out_channels) - 1))

    def layout(self, model: Any) -> dict[str, Any]:
        """All that `build` asks for, but for the section of its own."""
        return _layout(model.config)

    def latent_channels(self, model: Any) -> int:
        """Dimensions of a code."""
        return int(model.quantize.embedding.weight.shape[1])

    def last_layer(self, model: Any) -> Tensor:
        """Of the decoder's `conv_out`."""
        return model.decoder.conv_out.weight


class FSQ(VQ):
    """`VQModel` whose codebook is a finite grid (Mentzer et al. 2023): no codes to learn."""

    name = "fsq"
    section = GridConfig  # type: ignore[assignment]

    def build(self, config: ModelConfig, sample_size: int) -> VQModel:
        """A latent channel for each axis of the grid."""
        levels = section(config, self.name, GridConfig).levels
        if min(levels, default=0) < 2:
            raise ConfigError(
                f"model.fsq.levels is {list(levels)}: give at least two levels on every axis"
            )
        return self._model(config, sample_size, math.prod(levels), len(levels))

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """The grid; without a configuration the codebook that carries it."""
        if config is None:
            return super().bottleneck(model)
        grid = FiniteGrid(section(config, self.name, GridConfig).levels)
        carried = model.quantize.embedding.weight.requires_grad_(False)
        if carried.shape != grid.points.shape or (
            config.pretrained is not None and not torch.equal(carried.cpu(), grid.points)
        ):
            raise ConfigError(
                f"model.fsq.levels is {list(grid.levels)}, but model.pretrained "
                f"{config.pretrained!r} carries another codebook ({len(carried)} codes of "
                f"{carried.shape[1]}): give its levels, or train it with model.family vq"
            )
        return grid


@dataclass(frozen=True)
class DCConfig:
    """Deep compression (DC-AE, Chen et al. 2024)."""

    attention_levels: NonNegativeInt = 2
    """How many of the deepest levels are EfficientViT blocks with linear attention; the others are
    residual blocks."""
    head_dim: PositiveInt = 32
    """Channels of an attention head; it divides the widths of those levels."""


class DC(Family):
    """`AutoencoderDC`: pixels move into channels, and shortcuts carry them past every level."""

    name = "dc"
    model_class = AutoencoderDC
    section = DCConfig
    carrier = ScalingOnly()
    encoded_as = "latent"
    checkpointing_problem = "diffusers has no gradient checkpointing for AutoencoderDC"

    def build(self, config: ModelConfig, sample_size: int) -> AutoencoderDC:
        """One level per width; shortcuts need widths that fit each other and the latents."""
        for problem in _dc_problems(config):
            raise ConfigError(problem)
        options = section(config, self.name, DCConfig)
        levels = len(config.block_out_channels)
        plain = max(levels - options.attention_levels, 0)
        kinds = ("ResBlock",) * plain + ("EfficientViTBlock",) * (levels - plain)
        scales = ((),) * plain + ((5,),) * (levels - plain)
        return AutoencoderDC(
            in_channels=config.in_channels,
            latent_channels=config.latent_channels,
            attention_head_dim=options.head_dim,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=config.block_out_channels,
            decoder_block_out_channels=config.block_out_channels,
            encoder_layers_per_block=(config.layers_per_block,) * levels,
            decoder_layers_per_block=(config.layers_per_block,) * levels,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
        )

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """None: the latents are what the encoder gives."""
        return Plain()

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """The latents."""
        return model.encode(images, return_dict=False)[0]

    def downsample_factor(self, model: Any) -> int:
        """Each level but the last halves."""
        return int(2 ** (len(model.config.encoder_block_out_channels) - 1))

    def layout(self, model: Any) -> dict[str, Any]:
        """Channels and widths."""
        return _levels(model.config)

    def last_layer(self, model: Any) -> Tensor:
        """Of the decoder's last convolution, which may lie in an upsampling block."""
        last = model.decoder.conv_out
        return last.weight if hasattr(last, "weight") else last.conv.weight


class Tiny(Family):
    """`AutoencoderTiny`: a few plain convolutions on every level (TAESD)."""

    name = "tiny"
    model_class = AutoencoderTiny
    encoded_as = "latents"
    checkpointing_problem = (
        "with it AutoencoderTiny's encoder skips the step from [-1, 1] to [0, 1], so its latents "
        "are others"
    )

    def build(self, config: ModelConfig, sample_size: int) -> AutoencoderTiny:
        """One level per width; the class needs them to be equal."""
        widths = config.block_out_channels
        if len(set(widths)) > 1:
            raise ConfigError(
                f"model.block_out_channels is {list(widths)}, but AutoencoderTiny needs the same "
                f"width on every level: use {[max(widths)] * len(widths)}"
            )
        deeper = (config.layers_per_block,) * (len(widths) - 1)
        return AutoencoderTiny(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            latent_channels=config.latent_channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1, *deeper),
            num_decoder_blocks=(*deeper, 1),
        )

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """None: the latents are what the encoder gives."""
        return Plain()

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """The latents."""
        return model.encode(images, return_dict=False)[0]

    def downsample_factor(self, model: Any) -> int:
        """Each level but the first halves."""
        return int(2 ** (len(model.config.encoder_block_out_channels) - 1))

    def layout(self, model: Any) -> dict[str, Any]:
        """Channels and widths."""
        return _levels(model.config)

    def last_layer(self, model: Any) -> Tensor:
        """Of the decoder's last convolution."""
        last: torch.nn.Conv2d = model.decoder.layers[-1]
        return last.weight


_MANY_CODES = 1024
"""Up to here free codes stay in use; above, only a linear codebook does (SimVQ, table 1)."""


def _blocks(config: ModelConfig, sample_size: int) -> dict[str, Any]:
    """What `AutoencoderKL` and `VQModel` share."""
    levels = len(config.block_out_channels)
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": sample_size,
        "force_upcast": False,
        "mid_block_add_attention": config.mid_block_attention,
    }


def _layout(config: Any) -> dict[str, Any]:
    """What `_blocks` was made from."""
    return {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_attention": config.get("mid_block_add_attention", True),
    }


def _levels(config: Any) -> dict[str, Any]:
    """What `AutoencoderDC` and `AutoencoderTiny` share."""
    return {
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": tuple(config.encoder_block_out_channels),
    }


def _dc_problems(config: ModelConfig) -> Iterator[str]:
    widths, latents = config.block_out_channels, config.latent_channels
    if widths[-1] % latents:
        yield (
            f"model.latent_channels ({latents}) does not divide the last width ({widths[-1]}) of "
            "model.block_out_channels, which AutoencoderDC's shortcuts need: change one of them"
        )
    for one, other in itertools.pairwise(widths):
        if (4 * one) % other or (4 * other) % one:
            yield (
                f"model.block_out_channels goes from {one} to {other}, which AutoencoderDC's "
                "shortcuts cannot bridge: each width divides four times its neighbour"
            )


for _family in (KL(), VQ(), FSQ(), DC(), Tiny()):
    register_family(_family)
