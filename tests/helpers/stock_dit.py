"""Run by test_train_diffusion in another process: loads and samples a pipeline with diffusers."""

import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
folder = Path(sys.argv[1])
pipeline = DiTPipeline.from_pretrained(folder / "pipeline")
pipeline.set_progress_bar_config(disable=True)
images = pipeline(
    class_labels=[0, 1, 0],
    num_inference_steps=3,
    generator=torch.Generator().manual_seed(0),
    output_type="np",  # of diffusers 0.38 this pipeline knows no "pt"
).images
save_file({"images": torch.from_numpy(images).contiguous()}, folder / "images.safetensors")
ours = [n for n in sys.modules if n.split(".")[0] in ("first_stage", "latent_tools")]
print(*ours)
sys.exit(1 if ours else 0)
