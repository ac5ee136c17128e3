"""Reading a cache in a diffusion model's training."""
