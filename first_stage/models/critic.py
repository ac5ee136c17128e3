"""The critic: patch logits and the feature maps on the way to them.

A PatchGAN discriminator (Isola et al. 2017, "Image-to-image translation with conditional
adversarial networks", section 3.2.2): each logit judges one patch of the image.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class CriticOutput(NamedTuple):
    """What the critic makes of a batch of images.

    Attributes:
        logits: `(B, S, h, w)`, one per patch and scale, without a final activation: a bounded
            output could not reach the margins of the hinge. The coarser scales' logits are repeated
            to the finest one's grid, so that every scale counts alike in a mean.
        features: The feature maps that `logits` is computed from, finest first, scale after scale,
            each `(B, C_l, h_l, w_l)`, after normalisation and activation.
    """

    logits: Tensor
    features: list[Tensor]


class Critic(nn.Module):
    """What the training needs of a critic: `forward` gives its `CriticOutput`."""

    def logits(self, images: Tensor) -> Tensor:
        """The logits alone, past any wrapper of `forward` such as autocast's."""
        output: CriticOutput = type(self).forward(self, images)
        return output.logits


class PatchCritic(Critic):
    """Strided 4x4 convolutions, doubling in width, then a 4x4 convolution and the patch logits.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first layer; doubled by every further one, up to eight times.
        layers: Strided layers, 1 to 5. The receptive field is 16, 34, 70, 142, 286 pixels.
        norm: `group`: group norm after every layer but the first; `spectral`: every weight divided
            by its largest singular value (Miyato et al. 2018, "Spectral normalization", equation
            8); or `none`.
        antialias: Convolve at full resolution, then blur and subsample (Zhang 2019, "Making
            convolutional networks shift-invariant again", section 3.2), with 3x3 kernels. A strided
            convolution sees an image and its shift by a pixel differently.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: str = "group",
        antialias: bool = False,
    ):
        super().__init__()
        blocks = []
        previous = in_channels
        for layer in range(layers + 1):
            channels = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            grouped = norm == "group" and layer > 0
            blocks.append(_block(previous, channels, stride, grouped, antialias))
            previous = channels
        self.blocks = nn.ModuleList(blocks)
        self.to_logits = nn.Conv2d(previous, 1, kernel_size=4, padding=1)
        self.apply(_initialize)
        if norm == "spectral":
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d):
                    parametrizations.spectral_norm(module)
            self.train()

    def train(self, mode: bool = True) -> "PatchCritic":
        """Set the mode of all parts but the spectral norms.

        In training mode each forward pass would move their estimates of the singular values: the
        reals' and the fakes' pass of a step would have different weights, and the result would
        depend on the number of micro-batches. See `advance_spectral_norm`.
        """
        super().train(mode)
        for _, norm in _spectral_norms(self):
            norm.eval()
        return self

    def forward(self, images: Tensor) -> CriticOutput:
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
        return CriticOutput(self.to_logits(hidden).float(), features)


class MultiScaleCritic(Critic):
    """Patch critics for the image and for smaller versions of it, each half as large.

    Wang et al. 2018, "High-resolution image synthesis and semantic manipulation with conditional
    GANs" (pix2pixHD), section 3.2.

    Args:
        critics: One for each scale, finest first.
    """

    def __init__(self, critics: list[PatchCritic]):
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, images: Tensor) -> CriticOutput:
        """Judge images `(B, C, H, W)` in [-1, 1]; the feature maps are those of every scale."""
        logits: list[Tensor] = []
        features: list[Tensor] = []
        for critic in self.critics:
            output = critic(images)
            logits.append(output.logits)
            features += output.features
            images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
        size = logits[0].shape[-2:]
        grids = [logits[0], *(F.interpolate(x, size, mode="nearest") for x in logits[1:])]
        return CriticOutput(torch.cat(grids, 1), features)


def make_critic(
    in_channels: int, width: int, layers: int, norm: str, antialias: bool, scales: int
) -> Critic:
    """A patch critic, or one for each of several scales.

    Args:
        in_channels: Channels of the images.
        width: As in `PatchCritic`.
        layers: As in `PatchCritic`.
        norm: As in `PatchCritic`.
        antialias: As in `PatchCritic`.
        scales: Number of scales; each further one sees images of half the size.
    """
    critics = [PatchCritic(in_channels, width, layers, norm, antialias) for _ in range(scales)]
    return critics[0] if scales == 1 else MultiScaleCritic(critics)


class BlurPool(nn.Module):
    """Blur with the binomial filter (1, 3, 3, 1), then take every second place.

    Args:
        channels: Channels; each is filtered alone.
    """

    kernel: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        # A constant, not a weight: it is neither trained nor saved.
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, H/2, W/2)`."""
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        kernel = self.kernel.to(padded.dtype).expand(self.channels, 1, 4, 4)
        return F.conv2d(padded, kernel, stride=2, groups=self.channels)


@torch.no_grad()
def update_average(average: nn.Module, critic: nn.Module, decay: float) -> None:
    """Move a copy of the critic towards it: average = decay average + (1 - decay) critic."""
    for mean, value in zip(average.parameters(), critic.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)
    for kept, buffer in zip(average.buffers(), critic.buffers(), strict=True):
        kept.copy_(buffer)


def advance_spectral_norm(critic: nn.Module) -> None:
    """One power iteration for every spectral norm: once a step, however many forward passes ran.

    Miyato et al. 2018, "Spectral normalization", algorithm 1.
    """
    with torch.no_grad():
        for module, norm in _spectral_norms(critic):
            norm.train()  # then reading the weight makes one iteration
            module.weight  # noqa: B018
            norm.eval()


def _spectral_norms(critic: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each normalised convolution and its normalisation."""
    for module in critic.modules():
        if parametrize.is_parametrized(module, "weight"):
            yield module, module.parametrizations["weight"][0]  # type: ignore[index, misc]


def _block(inputs: int, outputs: int, stride: int, grouped: bool, antialias: bool) -> nn.Sequential:
    # A bias before a normalisation would have no effect and a gradient of pure rounding noise.
    bias = not grouped
    blurred = antialias and stride == 2
    convolution = (
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=bias)
        if blurred
        else nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1, bias=bias)
    )
    parts: list[nn.Module] = [convolution]
    if grouped:
        parts.append(nn.GroupNorm(_groups(outputs), outputs))
    parts.append(nn.LeakyReLU(0.2))
    if blurred:
        parts.append(BlurPool(outputs))
    return nn.Sequential(*parts)


def _groups(channels: int) -> int:
    """At most 32 groups of at least 4 channels, dividing the width."""
    groups = min(32, max(channels // 4, 1))
    while channels % groups:
        groups -= 1
    return groups


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02), as in DCGAN and pix2pix."""
    if isinstance(module, nn.Conv2d):
        torch.nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
