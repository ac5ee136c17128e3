"""The first stage: a diffusers autoencoder behind one forward pass.

Shapes: images `(B, C_in, H, W)` in [-1, 1]; latents `(B, C, h, w)` with `h = H / f`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from first_stage.errors import ConfigError, UserError


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian q(z | x).

    Attributes:
        mean: `(B, C, h, w)`.
        logvar: `(B, C, h, w)`, natural logarithm of the variance, clamped to [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise`; `noise` is standard normal of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats: summed over a sample's latents. Shape `(B,)`, float32.

        Kingma & Welling 2014, appendix B.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


class Reconstruction(NamedTuple):
    """What a first stage makes of images.

    Attributes:
        images: `(B, C_in, H, W)`, not clamped; further latents' images follow.
        posterior: Of the images.
        latents: `(B, C, h, w)`, what `images` was decoded from; a leaf where the decoder was cut
            off from the encoder.
    """

    images: Tensor
    posterior: Posterior
    latents: Tensor


class FirstStage(nn.Module):
    """Encoder, posterior draw and decoder in ONE forward, so that a DDP wrapper sees all of it.

    `AutoencoderKL.forward` returns no posterior and takes the mode by default; this one returns
    both the reconstruction and the posterior, and samples with the noise it is given.

    Args:
        vae: The diffusers autoencoder. It is the only thing that is saved.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along a side (f)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (C)."""
        return int(self.vae.config.latent_channels)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return int(self.vae.config.in_channels)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where VQGAN balances its losses."""
        return self.vae.decoder.conv_out.weight

    @property
    def encoder_learns(self) -> bool:
        """Whether the encoder's weights ask for a gradient."""
        return any(p.requires_grad for p in self.vae.encoder.parameters())

    def freeze_encoder(self) -> None:
        """Let the decoder learn alone: what latents mean stays as it is."""
        for part in (self.vae.encoder, self.vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)
                part.zero_grad(set_to_none=True)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """`(C, h, w)` for square images of this side."""
        side = resolution // self.downsample_factor
        return (self.latent_channels, side, side)

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images `(B, C_in, H, W)` in [-1, 1]."""
        distribution = self.vae.encode(images, return_dict=False)[0]
        return Posterior(distribution.mean, distribution.logvar)

    def decode(self, latents: Tensor) -> Tensor:
        """Images from raw (unscaled) latents `(B, C, h, w)`."""
        return self.vae.decode(latents, return_dict=False)[0]

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        prior: Tensor | None = None,
        cut_off: bool = False,
    ) -> Reconstruction:
        """Reconstruct images through their posterior.

        Args:
            images: `(B, C_in, H, W)` in [-1, 1].
            noise: `(B, C, h, w)` standard normal, or `None` to decode the posterior's mode.
            prior: `(P, C, h, w)`, further latents to decode in the same pass.
            cut_off: End the decoder's graph at the latents, before the encoder.

        Returns:
            All of it float32, whatever autocast computes in.
        """
        posterior = self.encode(images)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        latents = posterior.mean if noise is None else posterior.sample(noise)
        if cut_off:
            latents = latents.detach().requires_grad_()
        decoded = latents if prior is None else torch.cat([latents, prior])
        return Reconstruction(self.decode(decoded).float(), posterior, latents)


def build_autoencoder(
    in_channels: int,
    latent_channels: int,
    block_out_channels: tuple[int, ...],
    layers_per_block: int,
    norm_num_groups: int,
    mid_block_attention: bool,
    quant_conv: bool,
    sample_size: int,
) -> AutoencoderKL:
    """A new `AutoencoderKL` with random weights.

    Args:
        in_channels: Channels of the images.
        latent_channels: Channels of the latents.
        block_out_channels: Width of each level; each but the last halves the resolution.
        layers_per_block: Residual blocks per level of the encoder (the decoder has one more).
        norm_num_groups: Groups of every group norm; divides every width.
        mid_block_attention: Self-attention at the lowest resolution.
        quant_conv: The 1x1 convolutions around the latents (Stable Diffusion 1.x and XL have them,
            SD3 and Flux do not).
        sample_size: Training resolution in pixels; what diffusers takes as its tile size.

    Returns:
        The autoencoder, in float32.
    """
    levels = len(block_out_channels)
    return AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=sample_size,
        # Until an export measures them, the latents are handed over as they are.
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        mid_block_add_attention=mid_block_attention,
    )


def load_autoencoder(name: str, revision: str | None = None) -> Any:
    """Load any diffusers autoencoder: a folder, a pipeline's folder, or a hub id.

    Args:
        name: A folder with `config.json` and safetensors weights, a pipeline's folder with a `vae`
            subfolder, or a hub id of either.
        revision: The hub revision.

    Returns:
        The autoencoder as the class that its `config.json` names, float32, in eval mode.

    Raises:
        UserError: When it cannot be loaded, or is not an autoencoder with `encode` and `decode`.
    """
    import diffusers

    if not name.strip():
        raise UserError("no first stage was named: give a diffusers folder or a hub id")
    local = Path(name)
    subfolder = None
    if local.exists():
        if (local / "vae" / "config.json").exists():
            subfolder = "vae"
        elif not (local / "config.json").exists():
            raise UserError(
                f"{name!r} is no diffusers folder: it has neither config.json nor vae/config.json"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name!r} does not exist (and is no hub id of the form owner/name)")
    try:
        config, subfolder = _read_config(name, local, subfolder, revision)
        class_name = str(config.get("_class_name", ""))
        cls = getattr(diffusers, class_name, None)
        if cls is None or not (hasattr(cls, "encode") and hasattr(cls, "decode")):
            raise UserError(
                f"{name!r} is not an autoencoder: its config.json names the class {class_name!r}, "
                "which has no encode and decode in diffusers"
            )
        model = cls.from_pretrained(
            name, subfolder=subfolder, revision=revision, use_safetensors=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the first stage {name!r} cannot be loaded: {first}") from error
    return model.eval()


def _read_config(
    name: str, local: Path, subfolder: str | None, revision: str | None
) -> tuple[dict[str, Any], str | None]:
    if local.exists():
        folder = local / subfolder if subfolder else local
        return json.loads((folder / "config.json").read_text()), subfolder
    from diffusers.configuration_utils import ConfigMixin
    from huggingface_hub.errors import EntryNotFoundError

    class _Any(ConfigMixin):
        config_name = "config.json"

    try:
        return dict(_Any.load_config(name, revision=revision)), None
    except (EntryNotFoundError, OSError):
        return dict(_Any.load_config(name, subfolder="vae", revision=revision)), "vae"


def require_kl(autoencoder: Any, name: str) -> AutoencoderKL:
    """The autoencoder, if the trainer can train it.

    Raises:
        ConfigError: When it is not an `AutoencoderKL`.
    """
    if not isinstance(autoencoder, AutoencoderKL):
        raise ConfigError(
            f"model.pretrained {name!r} is a {type(autoencoder).__name__}; the trainer fits "
            "AutoencoderKL first stages"
        )
    return autoencoder
