"""How well a small diffusion transformer learns the latents of a first stage."""
