"""Train the first stage of a latent diffusion model on your own images."""

__version__ = "0.1.0"
