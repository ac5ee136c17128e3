"""Helpers of `test_pipelines.py` that other tests share."""

import torch
from diffusers import (
    DDIMScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

STEPS = 2


def unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def stable_diffusion_xl(vae):
    parts = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=parts, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip
    prompt = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    return pipeline, {
        "prompt_embeds": prompt, "negative_prompt_embeds": -prompt,
        "pooled_prompt_embeds": prompt[:, 0], "negative_pooled_prompt_embeds": -prompt[:, 0],
    }  # fmt: skip


def sample(build, vae) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents that a pipeline ends with, `(1, 4, 8, 8)`, and its pictures of them."""
    torch.manual_seed(3)
    pipeline, prompts = build(vae)
    pipeline.set_progress_bar_config(disable=True)
    made = {}
    for kind in ("latent", "pt"):
        made[kind] = pipeline(
            **prompts, num_inference_steps=STEPS, height=16, width=16, output_type=kind,
            generator=torch.Generator().manual_seed(2),
        ).images  # fmt: skip
    latents = made["latent"]
    if isinstance(pipeline, FluxPipeline):
        latents = pipeline._unpack_latents(latents, 16, 16, pipeline.vae_scale_factor)
    assert latents.shape == (1, 4, 8, 8)
    assert made["pt"].shape == (1, 3, 16, 16)
    return latents, made["pt"]
