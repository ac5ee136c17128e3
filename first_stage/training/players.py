"""The two networks that train against each other, and how they are made from a recipe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from first_stage.config.losses import CriticConfig
from first_stage.config.schema import Config, ModelConfig, TrainConfig
from first_stage.errors import ConfigError
from first_stage.models.carriers import set_scale
from first_stage.models.channels import add_latent_channels, inflate_images
from first_stage.models.critic import Critic, make_critic
from first_stage.models.discrete import Discrete
from first_stage.models.families import family_named, trainable_family_of
from first_stage.models.first_stage import FirstStage, lay_out
from first_stage.models.loading import load_autoencoder
from first_stage.models.original import OriginalEncoder
from first_stage.models.padding import set_padding

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Player(Generic[Network]):
    """One of the two networks that train against each other.

    Attributes:
        network: The module itself; its weights are what is saved.
        module: The same, wrapped by accelerate: the one to call.
        optimizer: AdamW over its parameters.
        learning_rate: Its peak.
    """

    network: Network
    module: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def make_optimizer(
    parameters: Sequence[nn.Parameter], learning_rate: float, config: TrainConfig
) -> torch.optim.Optimizer:
    """A player's AdamW, as `train.optimizer` says.

    Raises:
        ConfigError: When 8-bit states are asked for where bitsandbytes is not installed, or not on
            a GPU.
    """
    options: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, fused=True, **options)
    field = f"train.optimizer is {config.optimizer}"
    device = parameters[0].device.type
    if device != "cuda":
        raise ConfigError(f"{field}, which needs a CUDA GPU, but this runs on {device}: use adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"{field}, but bitsandbytes cannot be imported: pip install bitsandbytes, or use adamw"
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, **options)
    return made


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate that a step uses: warm-up, plateau, cosine decay.

    A function of the step alone, so it is the same on any number of processes and needs no state.
    """
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay_start = config.max_steps - config.decay_steps
    if step < decay_start:
        return warm
    progress = (step - decay_start + 1) / config.decay_steps
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return warm * (config.final_rate + (1.0 - config.final_rate) * cosine)


def make_first_stage(config: ModelConfig, resolution: int) -> FirstStage:
    """The first stage to train: a new one, or the pretrained one that is named.

    Args:
        config: Its family and layout.
        resolution: Side of the training crops, in pixels.

    Raises:
        ConfigError: When the pretrained one is of no family that can be trained, has another
            number of image channels, or cannot be trained in the way that is asked for.
    """
    if config.pretrained is None:
        family = family_named(config.family)
        model = family.build(config, resolution)
        if config.initialization == "quiet":
            family.begin_quietly(model)
        stage = FirstStage(model, family, family.bottleneck(model, config))
    else:
        stage = _pretrained(config, config.pretrained)
    if config.decoder_padding is not None:
        problem = stage.family.padding_problem
        if config.decoder_padding == "reflect" and problem is not None:
            raise ConfigError(
                f"model.decoder_padding is reflect, but {problem}: set it to zeros or null"
            )
        set_padding(stage.model, config.decoder_padding)
    if config.gradient_checkpointing:
        if (problem := stage.family.checkpointing_problem) is not None:
            raise ConfigError(
                f"model.gradient_checkpointing is true, but {problem}: set it to false"
            )
        stage.model.enable_gradient_checkpointing()
    # Nothing in it acts otherwise in training mode (no dropout, no batch norm), in which diffusers'
    # residual blocks copy their largest inputs out of the channels-last layout: 8 % of a step.
    return stage.eval()


def keep_original(
    config: Config, stage: FirstStage, device: torch.device
) -> OriginalEncoder | None:
    """A copy of the pretrained encoder, where `loss.original` holds latents to it.

    Args:
        config: The run's configuration.
        stage: The first stage to train, as it begins.
        device: Where the copy goes.

    Raises:
        ConfigError: When latents are codes: between those there is no distance to learn by.
    """
    if config.loss.weight_of("original") == 0 or config.model.pretrained is None:
        return None
    if isinstance(stage.bottleneck, Discrete):
        raise ConfigError(
            "loss.original has a weight, but this first stage's latents are codes of a codebook, "
            "which stay or change whole: set it to 0, or train the decoder alone (train.parts "
            "[decoder]), which keeps them"
        )
    original = OriginalEncoder(stage, config.model.more_latent_channels).to(device)
    lay_out(original)
    return original


def build_critic(config: CriticConfig, first_stage: FirstStage) -> Critic:
    """The critic of a recipe, for the images of a first stage."""
    return make_critic(
        first_stage.in_channels,
        config.width,
        config.layers,
        config.norm,
        config.antialias,
        config.scales,
    )


def _pretrained(config: ModelConfig, name: str) -> FirstStage:
    model = load_autoencoder(name, field="model.pretrained")
    if config.inflate_channels:
        inflate_images(model, config.in_channels)
    add_latent_channels(model, config.more_latent_channels)
    family = trainable_family_of(model, name, config.family)
    for part in family.idle_parts(model):
        part.requires_grad_(False)
    stage = FirstStage(model, family, family.bottleneck(model, config), name)
    set_scale(family.carrier, model, config.scaling_factor, config.shift_factor)
    if stage.in_channels != config.in_channels:
        raise ConfigError(
            f"model.in_channels is {config.in_channels}, but model.pretrained {name!r} takes "
            f"{stage.in_channels} channels: set it to that, or model.inflate_channels to true"
        )
    return stage
