"""`first-stage latents info|verify|stats|preview|gc|export CACHE`."""

from latent_tools.__main__ import main

__all__ = ["main"]
