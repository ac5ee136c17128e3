"""Precompute a data set's latents and read them for training a diffusion model."""

from latent_tools.dataset import LatentDataset
from latent_tools.encode import Outcome, Process, precompute
from latent_tools.files import CacheError
from latent_tools.manifest import Manifest
from latent_tools.options import CacheOptions

__all__ = [
    "CacheError",
    "CacheOptions",
    "LatentDataset",
    "Manifest",
    "Outcome",
    "Process",
    "precompute",
]
