"""Any diffusers autoencoder as one thing: images to latents and back, at any size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.errors import UserError

_PROBE_SIDES = (64, 256, 224)
"""Sides of the image that finds out the downsample factor: the first one that an encoder takes."""


@dataclass(frozen=True)
class Encoded:
    """Latents of images.

    Attributes:
        latents: `(B, C, h, w)` float32: the posterior's mode, or what an encoder without a
            posterior gives.
        logvar: Logarithm of the posterior's variance, of the same shape; `None` without one.
    """

    latents: Tensor
    logvar: Tensor | None


class Codec:
    """Encode and decode with any diffusers autoencoder of images.

    Autoencoders differ in what `encode` returns: `AutoencoderKL` a posterior, `VQModel` and
    `AutoencoderTiny` latents, `AutoencoderDC` a latent. Images are padded to a multiple of the
    downsample factor by repeating their last row and column, and reconstructions cropped back.

    Args:
        autoencoder: The autoencoder, in eval mode on its device.
        name: How users know it, for messages.

    Raises:
        UserError: When it does not turn images into latents and back.
    """

    def __init__(self, autoencoder: Any, name: str):
        if not (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode")):
            raise UserError(
                f"{name!r} is a {type(autoencoder).__name__}, not an autoencoder: it has no encode "
                "and decode"
            )
        self.autoencoder, self.name = autoencoder, name
        self.in_channels = int(getattr(autoencoder.config, "in_channels", 3))
        parameter = next(autoencoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.downsample_factor, self.latent_channels = self._probe()

    @property
    def parameters(self) -> int:
        """Number of weights."""
        module: nn.Module = self.autoencoder
        return sum(p.numel() for p in module.parameters())

    def pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until the downsample factor divides both sides."""
        f = self.downsample_factor
        bottom, right = -images.shape[-2] % f, -images.shape[-1] % f
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """Latents of images `(B, C_in, H, W)` in [-1, 1] whose sides the factor divides."""
        output = self.autoencoder.encode(images.to(self.device, self.dtype))
        if (posterior := getattr(output, "latent_dist", None)) is not None:
            logvar = getattr(posterior, "logvar", None)
            return Encoded(posterior.mode().float(), None if logvar is None else logvar.float())
        for field in ("latents", "latent"):
            if isinstance(latents := getattr(output, field, None), Tensor):
                return Encoded(latents.float(), None)
        raise UserError(
            f"{self.name!r} ({type(self.autoencoder).__name__}): encode returned "
            f"{type(output).__name__}, which holds neither a posterior nor latents"
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, C_in, H, W)` float32, not clamped, from raw latents `(B, C, h, w)`."""
        return self.autoencoder.decode(latents.to(self.device, self.dtype)).sample.float()

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Encoded]:
        """Reconstructions of images `(B, C_in, H, W)` of any size, and their latents.

        Raises:
            UserError: When reconstructions come back in another size.
        """
        padded = self.pad(images)
        encoded = self.encode(padded)
        decoded = self.decode(encoded.latents)
        if decoded.shape != padded.shape:
            raise UserError(
                f"{self.name!r} makes images of {tuple(decoded.shape[1:])} from "
                f"{tuple(padded.shape[1:])}: a reconstruction has the size of its original"
            )
        return decoded[..., : images.shape[-2], : images.shape[-1]], encoded

    def _probe(self) -> tuple[int, int]:
        """Downsample factor and latent channels, from a gray image."""
        problem = ""
        for side in _PROBE_SIDES:
            image = torch.zeros(1, self.in_channels, side, side)
            try:
                latents = self.encode(image).latents
                if latents.ndim != 4:
                    problem = f"its latents have {latents.ndim} axes, not (B, C, h, w)"
                    break
                decoded = self.decode(latents)
            except UserError:
                raise
            except Exception as error:
                problem = problem or (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if decoded.shape != image.shape:
                problem = f"{tuple(image.shape)} came back as {tuple(decoded.shape)}"
                break
            return side // latents.shape[-2], latents.shape[1]
        raise UserError(
            f"{self.name!r} ({type(self.autoencoder).__name__}) does not encode and decode images "
            f"(B, {self.in_channels}, H, W): {problem}"
        )
