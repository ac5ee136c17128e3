"""What the objectives are judged by, on held-out photos: fidelity, realism, detail."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from first_stage.evaluation.codes import CodeCounts
from first_stage.metrics import images as metrics
from first_stage.metrics.feature_networks import EfficientNetLite0, as_rgb
from first_stage.metrics.frechet import GaussianStatistics, frechet_distance
from first_stage.metrics.spectrum import SharpnessSums
from first_stage.models.first_stage import as_first_stage, reconstruct

BLOCK = 5
"""Which inverted residual block's output is the local feature: 40 channels per 8 x 8 pixels."""


@dataclass(frozen=True)
class Scores:
    """How one first stage does.

    Attributes:
        psnr: Mean over images, in dB.
        local_frechet: Frechet distance between the local features of originals and of
            reconstructions, each place of each image a sample.
        high_frequencies: Energy of the reconstructions at 0.25 cycles per pixel and above, as a
            share of the originals'.
        feature_distance: Euclidean distance between the local features of an image and of its
            reconstruction at the same place, mean over places and images.
        codes_used: Share of the codes that the images use; `None` without codes.
        codes_perplexity: As many equally frequent codes would be as hard to guess.
    """

    psnr: float
    local_frechet: float
    high_frequencies: float
    feature_distance: float
    codes_used: float | None = None
    codes_perplexity: float | None = None


class LocalFeatures(nn.Module):
    """EfficientNet-Lite0 up to its fifth block, at the images' own resolution.

    None of the objectives compared was trained with this network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0().network.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 40, H/8, W/8)` of images `(B, C, H, W)` in [-1, 1]."""
        network = self.network
        levels = as_rgb(images).float().add(1).mul(127.5)
        hidden = (levels - 127.0) / 128.0
        hidden = network._swish(network._bn0(network._conv_stem(hidden)))
        for block in network._blocks[:BLOCK]:
            hidden = block(hidden)
        return hidden


@torch.no_grad()
def score(first_stage: Any, images: Tensor, network: LocalFeatures, batch_size: int = 16) -> Scores:
    """Measure a first stage by the 8-bit protocol: the posterior's mode, clamped and rounded.

    Args:
        first_stage: A first stage or a diffusers autoencoder, in eval mode.
        images: `(N, C, H, W)` in [-1, 1].
        network: Gives the local features.
        batch_size: Images at a time; it does not change the result.
    """
    stage = as_first_stage(first_stage)
    device = stage.device
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
    statistics: list[GaussianStatistics] = []
    sharpness, codes = SharpnessSums(), CodeCounts(stage)
    for batch in images.split(batch_size):
        originals = metrics.eight_bit(batch.to(device))
        decoded, encoded = reconstruct(stage, batch.to(device))
        rebuilt = metrics.eight_bit(decoded)
        codes.update(encoded.latents)
        sums[0] += metrics.psnr(originals, rebuilt).sum()
        sharpness.update(originals, rebuilt)
        features = [network(x) for x in (originals, rebuilt)]
        difference = (features[0] - features[1]).double()
        sums[1] += difference.square().sum(1).sqrt().mean((1, 2)).sum()
        vectors = [f.movedim(1, -1).flatten(0, 2) for f in features]
        statistics = statistics or [GaussianStatistics(v.shape[1]) for v in vectors]
        for part, vector in zip(statistics, vectors, strict=True):
            part.update(vector)
    kept, usage = sharpness.summary()["high_frequency_kept"], codes.summary(lambda counts: counts)
    return Scores(
        psnr=float(sums[0] / len(images)),
        local_frechet=frechet_distance(*statistics).value,
        high_frequencies=float("nan") if kept is None else float(kept),  # type: ignore[arg-type]
        feature_distance=float(sums[1] / len(images)),
        codes_used=usage.get("used"),
        codes_perplexity=usage.get("perplexity"),
    )
