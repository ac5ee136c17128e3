"""Precompute a data set's latents and read them for training a diffusion model."""
