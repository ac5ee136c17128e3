"""How much of the encoder's own rate a whole launch keeps."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from first_stage.data import Reading, Source, images_from_pixels
from first_stage.models.first_stage import as_first_stage
from latent_tools.build.encoder import LatentEncoder
from latent_tools.build.images import ChunkReader, Preprocessing
from latent_tools.build.launch import Process, precompute
from latent_tools.build.options import CacheOptions


@dataclass(frozen=True)
class Rates:
    """Images per second.

    Attributes:
        encode_only: Of the encoder, on pixels that are in memory.
        decode_only: Of reading, decoding and cropping the files, by one process.
        end_to_end: Of a launch, from files to a finished cache, without loading the first stage.
        waits: Seconds that the launch waited for data, encoder and disk.
    """

    encode_only: float
    decode_only: float
    end_to_end: float
    waits: dict[str, float]

    @property
    def share(self) -> float:
        """The share of the encoder's own rate that a launch keeps."""
        return self.end_to_end / self.encode_only


def cache_rates(
    autoencoder: nn.Module,
    source: Source,
    options: CacheOptions,
    device: torch.device | None = None,
    folder: Path | None = None,
) -> Rates:
    """Measure the rates on all images of a source, in this process.

    Args:
        autoencoder: The first stage.
        source: The images; they are all held in memory for the encode-only rate.
        options: How; no buckets.
        device: Where.
        folder: Where the cache is made; a temporary folder when `None`.

    Returns:
        The rates. Everything is encoded once before anything is timed.
    """
    device = device or torch.device("cpu")
    stage = as_first_stage(autoencoder, "benchmark")
    encoder = LatentEncoder(stage, device, options.precision, options.compile)
    shape = (options.resolution, options.resolution)
    reader = ChunkReader(
        source,
        Preprocessing(
            options.reading or Reading(stage.in_channels),
            options.resolution,
            options.resize,
            False,
            (),
        ),
    )
    start = time.perf_counter()
    pixels = [
        torch.from_numpy(reader.read(source.id(place), place, shape)[1])
        for place in range(len(source))
    ]
    decode_only = len(pixels) / (time.perf_counter() - start)
    batches = [
        torch.stack(pixels[start : start + options.batch_size])
        for start in range(0, len(pixels), options.batch_size)
    ]

    def encode() -> None:
        for batch in batches:
            images = images_from_pixels(batch.to(device))
            encoder(images).cpu()
            if options.flip:
                encoder(images.flip(3)).cpu()

    encode()
    start = time.perf_counter()
    encode()
    encode_only = len(pixels) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        start = time.perf_counter()
        outcome = precompute(
            autoencoder, "benchmark", source, output, options, Process(device=device)
        )
        end_to_end = len(source) / (time.perf_counter() - start)
    return Rates(encode_only, decode_only, end_to_end, outcome.waits)
