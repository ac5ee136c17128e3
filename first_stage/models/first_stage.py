"""The first stage: any diffusers autoencoder behind one forward pass.

Shapes: images `(B, C_in, H, W)` in [-1, 1]; latents `(B, C, h, w)` with `h = H / f`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.errors import UserError
from first_stage.models import (  # noqa: F401  # families register themselves
    asymmetric,
    built_in,
    flux2,
    hunyuan_image,
    one_frame,
)
from first_stage.models.bottlenecks import Bottleneck, Code, Encoded
from first_stage.models.discrete import Discrete
from first_stage.models.disturb import Disturbance, disturb, like
from first_stage.models.families import Family, family_of
from first_stage.models.padding import least_latents


class Reconstruction(NamedTuple):
    """What a first stage makes of images in training.

    Attributes:
        images: `(B, C_in, H, W)`, not clamped; further latents' images follow.
        code: Of the images.
        latents: `(B, C, h, w)`, what `images` was decoded from; a leaf where the decoder was cut
            off from the encoder.
        targets: `(B, C_in, H, W)`, what the images decoded are to be: those given, or as they were
            changed along with their latents.
    """

    images: Tensor
    code: Code
    latents: Tensor
    targets: Tensor


class FirstStage(nn.Module):
    """Encoder, bottleneck and decoder in ONE forward, so that a DDP wrapper sees all of it.

    `AutoencoderKL.forward` returns no posterior and takes the mode by default; this one returns
    the reconstruction and everything the bottleneck has to say, and draws with the noise that it is
    given. Training, validation, evaluation, export, cache and preview all go through this class.

    Args:
        model: The diffusers autoencoder. It is what is handed over.
        family: What knows the model's class; found when `None`.
        bottleneck: Between its halves; the family's own when `None`.
        name: How users know it, for messages.

    Raises:
        UserError: When the model does not turn images into latents and back.
    """

    def __init__(
        self,
        model: Any,
        family: Family | None = None,
        bottleneck: Bottleneck | None = None,
        name: str = "the first stage",
    ):
        super().__init__()
        self.family = family or family_of(model, name)
        self.model = model
        self.bottleneck = bottleneck or self.family.bottleneck(model)
        self.name = name

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along a side (f)."""
        return self.family.downsample_factor(self.model)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (C)."""
        return self.family.latent_channels(self.model)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.family.in_channels(self.model)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where VQGAN balances its losses."""
        return self.family.last_layer(self.model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def scaling_and_shift(self) -> tuple[float, float]:
        """What its pipelines apply: (z - shift) * scaling."""
        return self.family.carrier.read(self.model)

    @property
    def encoder_learns(self) -> bool:
        """Whether the encoder's weights ask for a gradient."""
        return any(p.requires_grad for p in self.family.encoder_parts(self.model)[0].parameters())

    def freeze_encoder(self) -> None:
        """Let the decoder learn alone: what latents mean stays as it is."""
        for part in (*self.family.encoder_parts(self.model), self.bottleneck):
            part.requires_grad_(False)
            part.zero_grad(set_to_none=True)

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """`(C, h, w)` for images of this size, or for square ones of this side."""
        factor = self.downsample_factor
        return (self.latent_channels, height // factor, (width or height) // factor)

    def encode(self, images: Tensor) -> Encoded:
        """Latents of images `(B, C_in, H, W)` in [-1, 1] whose sides the factor divides.

        Returns:
            Float32, as they are handed over: the posterior's mode, without a draw.
        """
        return self.bottleneck.encode(self.family.to_code(self.model, images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, C_in, H, W)` float32, not clamped, from raw (unscaled) latents."""
        return self._to_images(self.bottleneck.settle(latents).to(self.dtype))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Images `(B, C_in, H, W)` float32, not clamped, from numbers of codes `(B, h, w)`.

        Raises:
            UserError: When there is no codebook, or it does not have such codes.
        """
        if not isinstance(self.bottleneck, Discrete):
            raise UserError(f"{self.name!r} ({type(self.model).__name__}) has no codebook")
        count = len(self.bottleneck.usage)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
            raise UserError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())} do not number the {count} "
                f"codes of {self.name!r}"
            )
        return self._to_images(self.bottleneck.from_tokens(tokens.long()).to(self.dtype))

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        prior: Tensor | None = None,
        cut_off: bool = False,
        disturbance: Disturbance | None = None,
        encoded: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct images through their bottleneck.

        Args:
            images: `(B, C_in, H, W)` in [-1, 1].
            noise: `(B, C, h, w)` standard normal, or `None` to decode without a draw.
            prior: `(P, C, h, w)`, further latents to decode in the same pass.
            cut_off: End the decoder's graph at the latents, before the encoder.
            disturbance: What is done to the latents before they are decoded; further latents are
                cropped to their size alone.
            encoded: What the encoder once gave for the images, which is then not run: moments
                `(B, 2C, h, w)` or latents `(B, C, h, w)`, or of one with a codebook the numbers of
                the codes `(B, h, w)` int64.

        Returns:
            All of it float32, whatever autocast computes in.
        """
        if encoded is None:
            encoded = self.family.to_code(self.model, images)
        elif isinstance(self.bottleneck, Discrete) and not encoded.is_floating_point():
            encoded = self.bottleneck.from_tokens(encoded)
        code = self.bottleneck(encoded.float(), noise)
        latents = code.latents
        if cut_off:
            latents = latents.detach().requires_grad_()
        decoded, targets = latents, images
        if disturbance is not None:
            decoded, targets = disturb(latents, images, disturbance)
        if prior is not None:
            decoded = torch.cat([decoded, self.bottleneck.settle(like(decoded, prior))])
        return Reconstruction(self._to_images(decoded), code, latents, targets)

    def _to_images(self, latents: Tensor) -> Tensor:
        """Images from settled latents; fewer than the decoder can reflect are repeated first."""
        sides, least = latents.shape[-2:], least_latents(self.model)
        below, right = (max(least - side, 0) for side in sides)
        if not (below or right):
            return self.family.to_images(self.model, latents).float()
        repeated = F.pad(latents, (0, right, 0, below), mode="replicate")
        height, width = (side * self.downsample_factor for side in sides)
        return self.family.to_images(self.model, repeated).float()[..., :height, :width]


def as_first_stage(model: Any, name: str | None = None) -> FirstStage:
    """A loaded diffusers autoencoder as a first stage; what is one already stays as it is.

    Args:
        model: The autoencoder, or a `FirstStage`.
        name: How users know it, for messages; `None` leaves the name it has.

    Raises:
        UserError: When it does not turn images into latents and back.
    """
    if not isinstance(model, FirstStage):
        return FirstStage(model, name=name or "the first stage")
    model.name = name or model.name
    return model


def lay_out(network: nn.Module) -> None:
    """Channels-last weights, with which convolutions are fastest, on CPUs and GPUs alike.

    Networks with convolutions over frames stay as they are: torch refuses that layout for them.
    """
    if all(p.ndim < 5 for p in network.parameters()):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pad(images: Tensor, factor: int) -> Tensor:
    """Repeat the last row and column until a downsample factor divides both sides."""
    bottom, right = -images.shape[-2] % factor, -images.shape[-1] % factor
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


@torch.no_grad()
def reconstruct(first_stage: FirstStage, images: Tensor) -> tuple[Tensor, Encoded]:
    """Reconstructions of images of any size, without a draw, and their latents.

    Args:
        first_stage: In eval mode.
        images: `(B, C_in, H, W)` in [-1, 1]; they are padded to a multiple of the downsample factor
            by repeating their last row and column, and reconstructions cropped back.

    Returns:
        `(B, C_in, H, W)` float32, not clamped, and the latents of the padded images.

    Raises:
        UserError: When reconstructions come back in another size.
    """
    padded = pad(images, first_stage.downsample_factor)
    encoded = first_stage.encode(padded.to(first_stage.device, first_stage.dtype))
    decoded = first_stage.decode(encoded.latents)
    if decoded.shape != padded.shape:
        raise UserError(
            f"{first_stage.name!r} makes images of {tuple(decoded.shape[1:])} from "
            f"{tuple(padded.shape[1:])}: a reconstruction has the size of its original"
        )
    return decoded[..., : images.shape[-2], : images.shape[-1]], encoded
