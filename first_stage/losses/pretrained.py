"""Terms by a pretrained VGG16: plain features, LPIPS' linear heads, Gram matrices.

One network looks at each image once, for all of them. The weights come from a file or a hub
repository; no other package is needed.
"""

import torch
from torch import Tensor, nn

from first_stage.config.losses import LossConfig, PretrainedConfig
from first_stage.losses.learned import gram_distances
from first_stage.losses.terms import Inputs, Surroundings, Term
from first_stage.models.vgg import STAGES, LPIPSHeads, VGG16Features, load_lpips_heads, load_vgg


class PretrainedFeatures(nn.Module):
    """VGG16's feature maps of images and reconstructions, as the recipe wants them.

    Args:
        config: Which layers and channels.
        network: VGG16.
        heads: For LPIPS.
    """

    channels: Tensor | None

    def __init__(
        self, config: PretrainedConfig, network: VGG16Features, heads: LPIPSHeads | None = None
    ):
        super().__init__()
        self.config, self.network, self.heads = config, network, heads
        channels = None if config.channels is None else torch.tensor(config.channels)
        self.register_buffer("channels", channels, persistent=False)
        # Convolutions are fastest on channels-last weights and images, on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @classmethod
    def load(cls, config: PretrainedConfig) -> "PretrainedFeatures":
        """With the weights that the configuration names.

        Raises:
            ConfigError: When a file cannot be had or lacks a tensor.
        """
        heads = load_lpips_heads(str(config.heads)) if config.lpips_weight > 0 else None
        return cls(config, load_vgg(str(config.weights)), heads)

    @property
    def depth(self) -> int:
        """How many of VGG16's feature maps are looked at: LPIPS needs all."""
        return len(STAGES) if self.heads is not None else max(self.config.layers) + 1

    def forward(self, rebuilt: Tensor, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """All maps of reconstructions and of images `(B, C, H, W)`; the images' without a graph."""
        with torch.no_grad():
            reals = self.network(self._three(images), self.depth)
        return self.network(self._three(rebuilt), self.depth), reals

    def chosen(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of `loss.pretrained.layers`."""
        return [maps[layer] for layer in self.config.layers]

    def _three(self, images: Tensor) -> Tensor:
        """The three channels that it looks at."""
        if self.channels is not None:  # a list of numbers would be sent to the device every time
            return images.index_select(1, self.channels)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class _Pretrained(Term):
    """A distance between VGG16's feature maps; all of them share one network and its maps."""

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        self.features = surroundings.network(
            PretrainedFeatures, lambda: PretrainedFeatures.load(config.pretrained)
        )
        self.autocast = surroundings.autocast

    def maps(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps of reconstructions and images."""

        def look() -> tuple[list[Tensor], list[Tensor]]:
            with self.autocast():
                return self.features(inputs.rebuilt, inputs.images)

        return inputs.once(PretrainedFeatures, look)


class VGG(_Pretrained):
    """Squared difference of features (Johnson et al. 2016, equation 2)."""

    name = "vgg"

    def value(self, inputs: Inputs) -> Tensor:
        """Mean over batch, channels, places and layers."""
        fakes, reals = map(self.features.chosen, self.maps(inputs))
        with self.autocast():
            each = [(f - r).square().mean() for f, r in zip(fakes, reals, strict=True)]
            return torch.stack(each).mean()


class LPIPS(_Pretrained):
    """LPIPS (Zhang et al. 2018) with VGG16."""

    name = "lpips"

    def value(self, inputs: Inputs) -> Tensor:
        """Mean over the batch."""
        assert self.features.heads is not None  # the term has a weight
        with self.autocast():
            return self.features.heads(*self.maps(inputs)).mean()


class Gram(_Pretrained):
    """Squared difference of Gram matrices (Gatys et al. 2016)."""

    name = "gram"

    def value(self, inputs: Inputs) -> Tensor:
        """Mean over batch and layers."""
        fakes, reals = map(self.features.chosen, self.maps(inputs))
        with self.autocast():
            return gram_distances(fakes, reals).mean()
