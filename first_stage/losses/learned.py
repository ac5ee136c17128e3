"""Distances between feature maps: how different two images are to a network.

Also known as feature matching, or a perceptual loss; this project's *learned distance*.

With a critic's feature maps this is the learned similarity of Larsen et al. 2016, "Autoencoding
beyond pixels using a learned similarity metric", equation 8: the critic has learned which features
matter in this data set, whatever its number of channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from first_stage.config.losses import FeatureDistance, LossConfig
from first_stage.losses.terms import Inputs, Surroundings, Term, schedule

_TINY = 1e-12


def absolute(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference over batch, channels and places."""
    return (fake - real).abs().mean()


def squared(fake: Tensor, real: Tensor) -> Tensor:
    """Mean squared difference over batch, channels and places."""
    return (fake - real).square().mean()


def cosine(fake: Tensor, real: Tensor) -> Tensor:
    """1 - cosine between the feature vectors of a place, mean over batch and places; 0 to 2.

    Written as half the squared difference of the unit vectors, which is the same and is exactly 0
    (with a gradient of 0) for identical features. A vector of zeros counts as it is.
    """
    units = [x / x.square().sum(1, keepdim=True).clamp_min(_TINY).sqrt() for x in (fake, real)]
    return 0.5 * (units[0] - units[1]).square().sum(1).mean()


DISTANCES: dict[FeatureDistance, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": absolute,
    "l2": squared,
    "cosine": cosine,
}


def feature_distances(
    fakes: Sequence[Tensor], reals: Sequence[Tensor], distance: FeatureDistance = "l1"
) -> Tensor:
    """The distance of each layer.

    Args:
        fakes: Feature maps of the reconstructions, each `(B, C_l, h_l, w_l)`.
        reals: Feature maps of the images, of the same shapes. They are detached: the distance must
            not be lowered by moving what it measures with.
        distance: `l1` (mean absolute difference), `l2` (mean squared difference) or `cosine`
            (1 - cosine between the vectors at each place).

    Returns:
        `(layers,)`: mean over batch, channels and places.
    """
    measure = DISTANCES[distance]
    return torch.stack([measure(f, r.detach()) for f, r in zip(fakes, reals, strict=True)])


def feature_magnitudes(reals: Sequence[Tensor], distance: FeatureDistance = "l1") -> Tensor:
    """The size of each layer's features, in the unit of `feature_distances`.

    Args:
        reals: Feature maps of the images, each `(B, C_l, h_l, w_l)`.
        distance: As in `feature_distances`.

    Returns:
        `(layers,)`, detached: mean absolute or mean squared value; 1 for `cosine`, which has no
        unit.
    """
    if distance == "cosine":
        return torch.ones(len(reals), device=reals[0].device)
    zeros = [r.new_zeros(()) for r in reals]
    return feature_distances([r.detach() for r in reals], zeros, distance)


def gram_matrix(features: Tensor) -> Tensor:
    """Inner products of the channels' maps, `(B, C, C)`, divided by C h w.

    Gatys et al. 2016, "Image style transfer using convolutional neural networks", equation 3, with
    the normalisation of Johnson et al. 2016, "Perceptual losses", equation 3.
    """
    batch, channels, height, width = features.shape
    rows = features.reshape(batch, channels, height * width)
    return rows @ rows.mT / (channels * height * width)


def gram_distances(fakes: Sequence[Tensor], reals: Sequence[Tensor]) -> Tensor:
    """Squared Frobenius distance of the Gram matrices of each layer, `(layers,)`; mean over batch.

    Johnson et al. 2016, "Perceptual losses for real-time style transfer and super-resolution",
    equation 4. The reals are detached.
    """
    return torch.stack(
        [
            (gram_matrix(f) - gram_matrix(r.detach())).square().sum((1, 2)).mean()
            for f, r in zip(fakes, reals, strict=True)
        ]
    )


class Learned(Term):
    """The distance between the critic's feature maps of images and reconstructions."""

    name, needs_critic = "learned", True

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        self.config, self.means = config.learned, surroundings.means
        weights = config.learned.layer_weights
        self._layers = (
            None if weights is None else torch.tensor(weights, device=surroundings.device)
        )

    def value(self, inputs: Inputs) -> Tensor:
        """Weighted mean over the layers of distance / magnitude of the reals' features.

        Dividing keeps one layer from drowning the others. The magnitudes are those of the steps
        before this one; in the first step that runs the critic there are none, and the distance is
        0.
        """
        assert inputs.critic is not None  # `needs_critic`
        config, outputs = self.config, inputs.critic
        maps = outputs.averaged or (outputs.real.features, outputs.fake.features)
        chosen = range(len(maps[0])) if config.layers is None else config.layers
        reals = [maps[0][i] for i in chosen]
        fakes = [maps[1][i][: len(inputs.images)] for i in chosen]
        distances = feature_distances(fakes, reals, config.distance)
        if config.normalise:
            self.means.observe("magnitude", feature_magnitudes(reals, config.distance))
            magnitudes = self.means.get("magnitude")
            if magnitudes is None:
                return 0.0 * distances.mean()
            distances = distances / magnitudes.clamp_min(_TINY)
        if self._layers is None:
            return distances.mean()
        return (distances * self._layers).sum() / self._layers.sum()

    def ramp(self, step: int) -> float:
        """As the recipe schedules it."""
        return schedule(step, self.config.start_step, self.config.ramp_steps)

    @property
    def is_ready(self) -> bool:
        """Without magnitudes yet it is no term: a gradient of 0 would mislead the balance."""
        return not self.config.normalise or self.means.get("magnitude") is not None
