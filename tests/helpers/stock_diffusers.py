"""Run by test_export in another process: loads an export with diffusers and nothing of ours."""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = load_file(folder / "images.safetensors")["images"]
vae = AutoencoderKL.from_pretrained(folder / "export")
found = {}
with torch.no_grad():
    posterior = vae.encode(images).latent_dist
    found["moments"] = posterior.parameters
    found["decoded"] = vae.decode(posterior.mean).sample

torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
    sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
)  # fmt: skip
dit = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
dit.set_progress_bar_config(disable=True)
made = dit(class_labels=[1, 2], num_inference_steps=2, output_type="np").images
found["dit"] = torch.from_numpy(made)

unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    cross_attention_dim=8, attention_head_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
text_encoder = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )
)  # fmt: skip
pipeline = StableDiffusionPipeline(
    vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=None, scheduler=DDIMScheduler(),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)  # fmt: skip
pipeline.set_progress_bar_config(disable=True)
prompt = torch.randn(1, 16, 8)
made = pipeline(
    prompt_embeds=prompt, negative_prompt_embeds=-prompt, num_inference_steps=2,
    height=16, width=16, output_type="np",
).images  # fmt: skip
found["stable_diffusion"] = torch.from_numpy(made)
save_file({k: v.contiguous() for k, v in found.items()}, folder / "found.safetensors")
ours = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "first_stage"]
print(*ours)
sys.exit(1 if ours else 0)
