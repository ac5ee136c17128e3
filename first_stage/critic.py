"""The critic: patch logits and the feature maps on the way to them.

A PatchGAN discriminator (Isola et al. 2017, "Image-to-image translation with conditional
adversarial networks", section 3.2.2): each logit judges one patch of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Verdict(NamedTuple):
    """What the critic makes of a batch of images.

    Attributes:
        logits: `(B, 1, h, w)`, one per patch, without a final activation: a bounded output could
            not reach the margins of the hinge.
        features: The feature maps that `logits` is computed from, finest first, each
            `(B, C_l, h_l, w_l)`, after normalisation and activation.
    """

    logits: Tensor
    features: list[Tensor]


class PatchCritic(nn.Module):
    """Strided 4x4 convolutions, doubling in width, then a 4x4 convolution and the patch logits.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first layer; doubled by every further one, up to eight times.
        layers: Strided layers, 1 to 5. The receptive field is 16, 34, 70, 142, 286 pixels.
        norm: `group` or `none`, after every layer but the first.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        blocks = []
        previous = in_channels
        for layer in range(layers + 1):
            channels = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            normalised = norm != "none" and layer > 0
            blocks.append(_block(previous, channels, stride, norm if normalised else "none"))
            previous = channels
        self.blocks = nn.ModuleList(blocks)
        self.to_logits = nn.Conv2d(previous, 1, kernel_size=4, padding=1)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Verdict:
        """Judge images.

        Args:
            images: `(B, C, H, W)` in [-1, 1].

        Returns:
            Logits and feature maps, float32 whatever autocast computes in.
        """
        features = []
        hidden = images
        for block in self.blocks:
            hidden = block(hidden)
            features.append(hidden.float())
        return Verdict(self.to_logits(hidden).float(), features)


def _block(inputs: int, outputs: int, stride: int, norm: str) -> nn.Sequential:
    # A bias before a normalisation would have no effect and a gradient of pure rounding noise.
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1, bias=norm == "none")
    ]
    if norm == "group":
        parts.append(nn.GroupNorm(_groups(outputs), outputs))
    parts.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*parts)


def _groups(channels: int) -> int:
    """At most 32 groups of at least 4 channels, dividing the width."""
    groups = min(32, max(channels // 4, 1))
    while channels % groups:
        groups -= 1
    return groups


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02), as in DCGAN and pix2pix."""
    if isinstance(module, nn.Conv2d):
        torch.nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
