"""The export checks itself: the stock class, loaded from the folder, gives what was trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from first_stage.errors import UserError
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage
from first_stage.models.padding import padding_of, set_padding
from first_stage.models.quiet import quiet_diffusers

_TOLERANCE = 1e-3
"""Of the largest value. Layouts of the weights and TensorFloat-32 stay below; a codebook that was
not written, or other weights, do not."""
_LATENTS = 8
"""Latents along a side of the image that is tried."""


@torch.no_grad()
def check_reload(first_stage: FirstStage, folder: Path) -> None:
    """Load a folder with diffusers alone, and compare latents, codes and images.

    Codes are compared on the same latents: one halfway between two codes would fall to either.

    Args:
        first_stage: What was saved.
        folder: Where.

    Raises:
        UserError: When the folder does not give back what was trained.
    """
    model = first_stage.model
    with quiet_diffusers():  # it does not know the padding, which is told to the user
        stock: Any = type(model).from_pretrained(
            folder, use_safetensors=True, torch_dtype=first_stage.dtype
        )
    stock = stock.to(first_stage.device).eval()
    if (padding := padding_of(stock)) == "reflect":
        set_padding(stock, padding)
    images = _images(first_stage)
    latents = first_stage.encode(images).latents
    problems = []
    if not _close(
        first_stage.family.to_code(stock, images), first_stage.family.to_code(model, images)
    ):
        problems.append("its encoder gives other latents")
    if isinstance(first_stage.bottleneck, Discrete):
        ours = first_stage.bottleneck.tokens(latents).flatten()
        theirs = stock.quantize(latents.to(stock.dtype))[2][2].flatten()
        if differing := int((ours != theirs).sum()):
            problems.append(f"{differing} of {len(ours)} codes differ")
        # The stock class does the quantizing itself; elsewhere nothing lies in between.
        decoded = stock.decode(latents.to(stock.dtype)).sample
    else:
        settled = first_stage.bottleneck.settle(latents)
        decoded = first_stage.family.to_images(stock, settled.to(stock.dtype))
    if not _close(decoded, first_stage.decode(latents)):
        problems.append("its decoder gives other images")
    if problems:
        raise UserError(
            f"the export does not give back what was trained: loaded by diffusers, "
            f"{' and '.join(problems)}. Nothing was written to {str(folder)!r}; please report this"
        )


def _images(first_stage: FirstStage) -> Tensor:
    """Smooth random pictures, `(2, C, H, W)`; the same in every run."""
    side = _LATENTS * first_stage.downsample_factor
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, first_stage.in_channels, 5, 5, generator=draw) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    return smooth.to(first_stage.device, first_stage.dtype)


def _close(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float(), expected.float()
    reach = expected.abs().max().clamp_min(1e-6)
    return bool((found - expected).abs().max() <= _TOLERANCE * reach)
