"""Precompute a data set's latents and read them for training a diffusion model."""

from latent_tools.dataset import LatentDataset
from latent_tools.encode import Outcome, Process, precompute
from latent_tools.files import CacheError
from latent_tools.manifest import Manifest
from latent_tools.options import CacheOptions
from latent_tools.samplers import BucketBatchSampler
from latent_tools.stream import LatentStream

__all__ = [
    "BucketBatchSampler",
    "CacheError",
    "CacheOptions",
    "LatentDataset",
    "LatentStream",
    "Manifest",
    "Outcome",
    "Process",
    "precompute",
]
