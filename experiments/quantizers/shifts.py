"""Held-out usage on more tokens: the same photos at every shift against the grid of tokens.

python -m experiments.quantizers.shifts --output runs/quantizers --rows simvq-16384 vq-16384

Few tokens cannot show many codes. Each held-out tile is moved by 0 to f - 1 pixels both ways, which
gives f * f times as many tokens of photos that were never seen.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from experiments.objectives.experiment import open_photos
from experiments.quantizers.rows import BASELINE, FIRST_STAGES
from first_stage.errors import run_command
from first_stage.evaluation.codes import CodeCounts
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder

_BATCH = 16


def main() -> None:
    """Print the usage of trained first stages, by row and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quantizers"))
    parser.add_argument("--rows", nargs="+", default=[n for n in FIRST_STAGES if n != "kl"])
    options = parser.parse_args()
    images = open_photos().held_out
    for row in options.rows:
        for folder in sorted((options.output / row).glob(f"seed-*/{BASELINE}")):
            stage = FirstStage(load_autoencoder(str(folder)))
            tokens, used = used_at_every_shift(stage, images)
            even = 1 - (1 - 1 / len(stage.bottleneck.usage)) ** tokens
            print(f"{row}, {folder.parent.name}: {used:.1%} of the codes in {tokens:,} tokens (all "
                  f"equally frequent: {even:.1%})", flush=True)  # fmt: skip


@torch.no_grad()
def used_at_every_shift(stage: FirstStage, images: Tensor) -> tuple[int, float]:
    """Number of tokens, and the share of the codes that are among them.

    Args:
        stage: A first stage with codes.
        images: `(N, C, H, W)` in [-1, 1], whose sides the downsample factor f divides; what is left
            of each has f pixels less on a side.
    """
    factor, counts = stage.downsample_factor, CodeCounts(stage)
    height, width = (side - factor for side in images.shape[-2:])
    for y in range(factor):
        for x in range(factor):
            for part in images[..., y : y + height, x : x + width].split(_BATCH):
                counts.update(stage.encode(part).latents)
    assert counts.counts is not None  # it has codes
    return int(counts.counts.sum()), counts.summary(lambda tensor: tensor)["used"]


if __name__ == "__main__":
    run_command(main)
