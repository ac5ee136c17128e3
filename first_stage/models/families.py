"""The families of first stages: how each diffusers class is built, called and handed over.

A first stage has three orthogonal parts. The *family*, here, knows one diffusers class: its
constructor, its two halves, which of its weights are the encoder's. The *bottleneck* turns the
encoder's output into latents (`bottlenecks`). The *carrier* says where scaling and shift are kept
(`carriers`). Training, evaluation, export and cache know none of them, only `FirstStage`.

The built-in families are in `built_in`. A new one is a class and a line,
`register_family(MyFamily())`, in one file: see `docs/extend/autoencoder.md`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from first_stage.config.schema import ModelConfig
from first_stage.config.sections import add_section
from first_stage.errors import ConfigError, UserError, first_line
from first_stage.models.bottlenecks import Bottleneck, Gaussian, Plain
from first_stage.models.carriers import Carrier, ScalingAndShift
from first_stage.models.initialization import silence_branches

_PROBE_SIDES = (64, 256, 224)
"""Sides of the image that finds out what an unknown class does: the first one that it takes."""


class Family(ABC):
    """One diffusers class. It keeps no state: every method takes the model.

    Attributes:
        name: As `model.family` has it.
        model_class: The class.
        section: A dataclass with the family's own fields of the recipe, found under
            `model.<name>`; `None` where the common ones do.
        carrier: Where its scaling and shift are kept.
        images_as: What `model.encode` takes, as code.
        encoded_as: What of `model.encode(images)` a diffusion model trains on, as code.
        checkpointing_problem: Why gradient checkpointing is refused; `None` where it works.
        padding_problem: Why its decoder cannot pad by reflection; `None` where it can.
    """

    name: ClassVar[str]
    model_class: ClassVar[type[nn.Module]]
    section: ClassVar[type | None] = None
    carrier: ClassVar[Carrier] = ScalingAndShift()
    images_as: ClassVar[str] = "images"
    encoded_as: ClassVar[str] = "latents"
    checkpointing_problem: ClassVar[str | None] = None
    padding_problem: ClassVar[str | None] = None

    @abstractmethod
    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """A new model with random weights, float32.

        Args:
            config: Its layout.
            sample_size: Side of the images it will be trained on, in pixels.
        """

    @abstractmethod
    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """The bottleneck of a model; `config` is that of a run that trains it."""

    @abstractmethod
    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """What the encoder gives for images `(B, C_in, H, W)` in [-1, 1], for the bottleneck."""

    def to_images(self, model: Any, latents: Tensor) -> Tensor:
        """Images, not clamped, from latents `(B, C, h, w)` that the bottleneck has settled."""
        return model.decode(latents, return_dict=False)[0]

    @abstractmethod
    def downsample_factor(self, model: Any) -> int:
        """Pixels per latent along a side (f)."""

    def latent_channels(self, model: Any) -> int:
        """Channels of the latents (C)."""
        return int(model.config.latent_channels)

    def in_channels(self, model: Any) -> int:
        """Channels of the images."""
        return int(model.config.in_channels)

    def layout(self, model: Any) -> dict[str, Any]:
        """The fields of `ModelConfig` in `LAYOUT` that describe a model, as a recipe has them."""
        config = model.config
        widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        found = {
            "family": self.name,
            "in_channels": self.in_channels(model),
            "latent_channels": self.latent_channels(model),
            "block_out_channels": tuple(widths) if widths else None,
            "layers_per_block": config.get("layers_per_block"),
            "norm_num_groups": config.get("norm_num_groups"),
            "mid_block_attention": config.get("mid_block_add_attention"),
            "quant_conv": config.get("use_quant_conv"),
        }
        return {name: value for name, value in found.items() if value is not None}

    @abstractmethod
    def last_layer(self, model: Any) -> Tensor:
        """Weight of the decoder's last convolution, where VQGAN balances its losses."""

    def encoder_parts(self, model: Any) -> list[nn.Module]:
        """What decides what latents mean: the parts that stay when the decoder learns alone."""
        parts = (model.encoder, getattr(model, "quant_conv", None))
        return [part for part in parts if part is not None]

    def begin_quietly(self, model: Any) -> None:
        """Make what `build` gave begin as `model.initialization: quiet` says.

        Raises:
            ConfigError: Where nothing in it is known to be a residual branch.
        """
        if not silence_branches(model):
            raise ConfigError(
                f"model.initialization is quiet, but of the blocks of {self.name} "
                f"({type(model).__name__}) none is known here: set it to diffusers"
            )

    def idle_parts(self, model: Any) -> list[nn.Module]:
        """What images never pass through: it has no gradient, and stays as it is in training."""
        return []


LAYOUT = (
    *("family", "in_channels", "latent_channels", "block_out_channels", "layers_per_block"),
    *("norm_num_groups", "mid_block_attention", "quant_conv"),
)
"""Fields of the recipe that a pretrained model decides itself."""
FAMILIES: dict[str, Family] = {}
"""The families by name; `register_family` adds one."""


def register_family(family: Family) -> None:
    """Make a family known: to `model.family`, to `--help`, and to whatever loads its class."""
    FAMILIES[family.name] = family
    if family.section is not None:
        add_section("model", family.name, family.section)


def only_pretrained(family: Family, instead: str) -> ConfigError:
    """What a family says that is fine-tuned, but not built anew.

    Args:
        family: The family.
        instead: What to do to train a new first stage, after "or".
    """
    return ConfigError(
        f"model.family is {family.name}, which is trained from a pretrained one: give "
        f"model.pretrained, or {instead}"
    )


def family_named(name: str) -> Family:
    """The family of a recipe.

    Raises:
        ConfigError: Naming those there are.
    """
    if name not in FAMILIES:
        raise ConfigError(f"model.family is {name!r}; it can be {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(model: Any, name: str) -> Family:
    """The family of a loaded model; a class that is not registered is tried out.

    Args:
        model: Anything with `encode` and `decode`.
        name: How users know it, for messages.

    Raises:
        UserError: When it does not turn images into latents and back.
    """
    for family in FAMILIES.values():
        if isinstance(model, family.model_class):
            return family
    return Unknown(model, name)


def trainable_family_of(model: Any, name: str, wanted: str) -> Family:
    """The family of a pretrained model that is to be trained.

    Args:
        model: The model.
        name: How users know it, for messages.
        wanted: `model.family`; it decides where several share the model's class.

    Raises:
        ConfigError: When its class is none that the trainer fits.
    """
    for family in (family_named(wanted), *FAMILIES.values()):
        if isinstance(model, family.model_class):
            return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES.values())
    raise ConfigError(
        f"model.pretrained {name!r} is a {type(model).__name__}; the trainer fits {known} first "
        "stages"
    )


class Unknown(Family):
    """Any other class with `encode` and `decode`: measured and cached, but not trained.

    Args:
        model: The model; it is called once to find out what it does.
        name: How users know it, for messages.

    Raises:
        UserError: When it does not turn images into latents and back.
    """

    name = "unknown"
    model_class = nn.Module

    def __init__(self, model: Any, name: str):
        if not (hasattr(model, "encode") and hasattr(model, "decode")):
            raise UserError(
                f"{name!r} is a {type(model).__name__}, not an autoencoder: it has no encode and "
                "decode"
            )
        self._label = name
        self._factor, self._channels = self._probe(model)

    def to_images(self, model: Any, latents: Tensor) -> Tensor:
        """The field `sample` of what `decode` gives."""
        return model.decode(latents).sample

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Not possible."""
        raise UserError(f"{self._label!r}: its class is none that the trainer builds")

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """Gaussian where `encode` gives a posterior, else plain."""
        return Gaussian() if self._has_posterior else Plain()

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """Moments of a posterior, or latents under one of their usual names."""
        output = model.encode(images)
        if (posterior := getattr(output, "latent_dist", None)) is not None:
            return torch.cat([posterior.mean, posterior.logvar], 1)
        for field in ("latents", "latent"):
            if isinstance(latents := getattr(output, field, None), Tensor):
                return latents
        raise UserError(
            f"{self._label!r} ({type(model).__name__}): encode returned {type(output).__name__}, "
            "which holds neither a posterior nor latents"
        )

    def downsample_factor(self, model: Any) -> int:
        """As it was seen."""
        return self._factor

    def latent_channels(self, model: Any) -> int:
        """As it was seen."""
        return self._channels

    def in_channels(self, model: Any) -> int:
        """As the config says, else 3."""
        return int(getattr(model.config, "in_channels", 3))

    def last_layer(self, model: Any) -> Tensor:
        """Not known."""
        raise UserError(f"{self._label!r}: its class is none that the trainer fits")

    @torch.no_grad()
    def _probe(self, model: Any) -> tuple[int, int]:
        """Downsample factor and latent channels, from a gray image."""
        parameter = next(model.parameters())
        channels, problem = self.in_channels(model), ""
        for side in _PROBE_SIDES:
            image = parameter.new_zeros(1, channels, side, side)
            try:
                code = self.to_code(model, image)
                self._has_posterior = hasattr(model.encode(image), "latent_dist")
                latents = self.bottleneck(model).encode(code).latents
                if latents.ndim != 4:
                    problem = f"its latents have {latents.ndim} axes, not (B, C, h, w)"
                    break
                decoded = self.to_images(model, latents)
            except UserError:
                raise
            except Exception as error:
                problem = problem or first_line(error)
                continue
            if decoded.shape != image.shape:
                problem = f"{tuple(image.shape)} came back as {tuple(decoded.shape)}"
                break
            return side // latents.shape[-2], latents.shape[1]
        raise UserError(
            f"{self._label!r} ({type(model).__name__}) does not encode and decode images "
            f"(B, {channels}, H, W): {problem}"
        )
