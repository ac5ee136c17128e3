"""A latent cache in the layouts that public diffusion trainers read."""

from latent_tools.export.run import export_cache

__all__ = ["export_cache"]
