"""`AsymmetricAutoencoderKL`, Stable Diffusion's encoder with a larger decoder."""

from typing import Any

from diffusers import AsymmetricAutoencoderKL
from torch import nn

from first_stage.config.schema import ModelConfig
from first_stage.models.built_in import KL
from first_stage.models.carriers import ScalingOnly
from first_stage.models.families import Family, only_pretrained, register_family


class Asymmetric(KL):
    """An encoder and a decoder of different widths and depths (Zhu et al. 2023).

    Its decoder also takes a mask and a masked image for inpainting. What reads those stays idle.
    """

    name = "asymmetric"
    model_class = AsymmetricAutoencoderKL
    carrier = ScalingOnly()
    checkpointing_problem = "diffusers has no gradient checkpointing for AsymmetricAutoencoderKL"
    padding_problem = "AsymmetricAutoencoderKL's decoder reads a mask in layers that stay untrained"

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Only pretrained ones are trained."""
        raise only_pretrained(self, "train a new one as family kl")

    def downsample_factor(self, model: Any) -> int:
        """Each level of the encoder but the last halves."""
        return int(2 ** (len(model.config.down_block_out_channels) - 1))

    def layout(self, model: Any) -> dict[str, Any]:
        """Channels, and the encoder's widths."""
        widths = tuple(model.config.down_block_out_channels)
        return {**Family.layout(self, model), "block_out_channels": widths}

    def idle_parts(self, model: Any) -> list[nn.Module]:
        """What reads the mask."""
        return [model.decoder.condition_encoder]


register_family(Asymmetric())
