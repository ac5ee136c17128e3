"""Video autoencoders that image models use with one frame: Qwen-Image's and Wan's.

Their tensors have five axes, `(B, C, 1, H, W)`; everybody else sees four. Their `decode` clamps to
[-1, 1], which lets no gradient pass beyond; here nothing does. What joins frames to one another
is idle, and the taps of convolutions that look back see zeros. Fine-tuned on images, they treat the
first frame of a video as trained, and later ones by weights that were made for others.
"""

from typing import Any

from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from first_stage.config.schema import ModelConfig
from first_stage.models.built_in import KL
from first_stage.models.carriers import MeanAndStd
from first_stage.models.families import Family, only_pretrained, register_family


class OneFrame(KL):
    """What both share: causal convolutions over time, means and deviations by channel."""

    carrier = MeanAndStd()
    images_as = "images[:, :, None]"
    padding_problem = "its convolutions over frames pad by themselves, with zeros"

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Only pretrained ones are trained."""
        raise only_pretrained(self, "train a new one as family kl with model.latent_channels 16")

    def to_code(self, model: Any, images: Tensor) -> Tensor:
        """The moments `(B, 2C, h, w)` of one frame, without memory for the next."""
        return model.quant_conv(self._encoded(model, images[:, :, None]))[:, :, 0]

    def to_images(self, model: Any, latents: Tensor) -> Tensor:
        """What `decode` makes of one frame before it clamps, without memory for the next."""
        return self._decoded(model, model.post_quant_conv(latents[:, :, None]))[:, :, 0]

    def _encoded(self, model: Any, frames: Tensor) -> Tensor:
        return model.encoder(frames)

    def _decoded(self, model: Any, frames: Tensor) -> Tensor:
        return model.decoder(frames)

    def downsample_factor(self, model: Any) -> int:
        """One halving for each entry of `temperal_downsample`."""
        return int(2 ** len(model.config.temperal_downsample))

    def latent_channels(self, model: Any) -> int:
        """As its config says."""
        return int(model.config.z_dim)

    def layout(self, model: Any) -> dict[str, Any]:
        """Channels."""
        return Family.layout(self, model)

    def idle_parts(self, model: Any) -> list[nn.Module]:
        """The convolutions between frames."""
        return [part for name, part in model.named_modules() if name.endswith("time_conv")]


class QwenImage(OneFrame):
    """`AutoencoderKLQwenImage`."""

    name = "qwen_image"
    model_class = AutoencoderKLQwenImage
    checkpointing_problem = "diffusers has no gradient checkpointing for AutoencoderKLQwenImage"

    def in_channels(self, model: Any) -> int:
        """As its config says."""
        return int(model.config.input_channels)


class Wan(OneFrame):
    """`AutoencoderKLWan`: 2.1 with f8, 2.2 with f16, whose encoder takes patches of 2x2 pixels."""

    name = "wan"
    model_class = AutoencoderKLWan
    checkpointing_problem = "diffusers has no gradient checkpointing for AutoencoderKLWan"

    def _encoded(self, model: Any, frames: Tensor) -> Tensor:
        return model.encoder(patchify(frames, patch_size=model.config.patch_size or 1))

    def _decoded(self, model: Any, frames: Tensor) -> Tensor:
        decoded = model.decoder(frames, first_chunk=True)
        return unpatchify(decoded, patch_size=model.config.patch_size or 1)

    def downsample_factor(self, model: Any) -> int:
        """As its config says."""
        return int(model.config.scale_factor_spatial)

    def in_channels(self, model: Any) -> int:
        """Of the images, before they are cut into patches."""
        return int(model.config.in_channels) // (model.config.patch_size or 1) ** 2


for _family in (QwenImage(), Wan()):
    register_family(_family)
