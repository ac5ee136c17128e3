"""Precompute a data set's latents and read them for training a diffusion model."""

from latent_tools.build.launch import Outcome, Process, precompute
from latent_tools.build.options import CacheOptions
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest
from latent_tools.read.collate import collate
from latent_tools.read.dataset import LatentDataset
from latent_tools.read.paired import CachedLatents
from latent_tools.read.samplers import BucketBatchSampler
from latent_tools.read.stream import LatentStream

__all__ = [
    "BucketBatchSampler",
    "CacheError",
    "CacheOptions",
    "CachedLatents",
    "LatentDataset",
    "LatentStream",
    "Manifest",
    "Outcome",
    "Process",
    "collate",
    "precompute",
]
