"""`AutoencoderKLHunyuanImage`, HunyuanImage's first stage of f16 or f32."""

from typing import Any

from diffusers import AutoencoderKLHunyuanImage

from first_stage.config.schema import ModelConfig
from first_stage.models.built_in import KL
from first_stage.models.carriers import ScalingOnly
from first_stage.models.families import Family, only_pretrained, register_family


class HunyuanImage(KL):
    """Levels of residual blocks; pixels move into channels past every one of them."""

    name = "hunyuan_image"
    model_class = AutoencoderKLHunyuanImage
    carrier = ScalingOnly()
    checkpointing_problem = "diffusers has no gradient checkpointing for AutoencoderKLHunyuanImage"

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """Only pretrained ones are trained."""
        raise only_pretrained(self, "train a new one of many channels as family dc")

    def downsample_factor(self, model: Any) -> int:
        """As its config says; levels beyond it keep the resolution."""
        return int(model.config.spatial_compression_ratio)

    def layout(self, model: Any) -> dict[str, Any]:
        """Channels and widths."""
        return Family.layout(self, model)


register_family(HunyuanImage())
