"""The objective's part of the configuration: the critic, the terms and their balance.

Every field's docstring is its `--help` text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from first_stage.config.sections import section, sections_of

FeatureDistance = Literal["l1", "l2", "cosine"]
PixelError = Literal["l1", "l2", "huber"]

FINEST = 0.71
"""Cycles per pixel of a checkerboard, the finest pattern: half a cycle along both axes."""


@dataclass(frozen=True)
class CriticConfig:
    """The patch critic, trained beside the autoencoder."""

    width: int = 64
    """Channels of its first layer; doubled by every further one, up to eight times."""
    layers: int = 3
    """Strided layers, 1 to 5; 3 sees patches of 70 pixels."""
    norm: Literal["group", "spectral", "none"] = "group"
    """group: group norm after the first layer; spectral: every weight divided by its largest
    singular value; batch statistics are not offered because they mix samples and processes."""
    antialias: bool = False
    """Blur before every subsampling (Zhang 2019): features that tolerate a shift by a pixel, for
    about twice the critic's time."""
    scales: int = 1
    """Critics beside each other, each further one on images of half the size (pix2pixHD)."""
    start_step: int = 0
    """Step at which the critic begins to train; it is not run before."""
    learning_rate: float | None = None
    """Learning rate of the critic (AdamW); null: train.learning_rate."""

    @property
    def smallest_image(self) -> int:
        """Side in pixels of the smallest image that it can judge."""
        # After the strided layers two 4x4 convolutions of stride 1 take one place each.
        return int(3 * 2 ** (self.layers + self.scales - 1))

    def rests_on(self, loss: "LossConfig") -> bool:
        """Whether any term of an objective uses a critic."""
        return loss.learned.weight > 0 or loss.adversarial.weight > 0


@dataclass(frozen=True)
class LearnedConfig:
    """The perceptual distance learned by the critic (Larsen et al. 2016)."""

    weight: float = 0.5
    """Weight of the distance; 0 switches it off."""
    distance: Literal["l1", "l2", "cosine"] = "l1"
    """Between feature maps: mean absolute difference, mean squared difference, or 1 - cosine of the
    vectors at each place."""
    layers: tuple[int, ...] | None = None
    """Which of the critic's feature maps, from 0 (finest), scale after scale; null: all."""
    layer_weights: tuple[float, ...] | None = None
    """Weight of each of these layers in their weighted mean; null: all alike."""
    normalise: bool = True
    """Divide each layer's distance by the mean size of its features on reals, so that no layer
    drowns the others."""
    ema_decay: float = 0.0
    """Measure with an exponential moving average of the critic with this decay per step, in [0, 1),
    so that the yardstick moves slowly; 0: with the critic as it is. Costs two more forward passes
    of the critic."""
    start_step: int = 0
    """Step at which it enters; not before the critic has begun to train."""
    ramp_steps: int = 0
    """Steps over which its weight grows from 0."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The critic's verdict as a loss of the autoencoder, and what keeps the critic in bounds."""

    kind: Literal["hinge", "wasserstein", "logistic", "least_squares", "relativistic"] = "hinge"
    """The pair of losses of critic and autoencoder: hinge (Geometric GAN), wasserstein (with
    gradient_penalty 10, or with clip_weights 0.01), logistic (non-saturating), least_squares,
    relativistic (R3GAN: with r1 and r2)."""
    weight: float = 0.2
    """Weight of the autoencoder's loss: under adaptive balance the norm of its gradient relative to
    that of all other terms together. 0 trains the critic for the learned distance only."""
    start_step: int = 0
    """Step at which it enters; not before the critic has begun to train."""
    ramp_steps: int = 0
    """Steps over which its weight grows from 0."""
    prior_samples: bool = False
    """The critic also sees decoded samples of the prior N(0, I) as fakes (Larsen et al. 2016);
    meant for a KL weight that keeps the posterior near it."""
    reaches_encoder: bool = True
    """Whether the adversarial gradient goes on into the encoder; false as in Larsen et al., for a
    second pass back through the decoder."""
    gradient_penalty: float = 0.0
    """Weight of the gradient penalty on lines between reals and fakes (WGAN-GP; 10 there)."""
    clip_weights: float = 0.0
    """Clamp the critic's weights to this after each of its updates (WGAN; 0.01 there); 0: off."""
    r1: float = 0.0
    """Weight gamma of the squared slope on reals, halved (R1)."""
    r2: float = 0.0
    """Weight gamma of the squared slope on fakes, halved (R2)."""
    penalty_every: int = 1
    """Steps between penalties on the slope, which then count that many times as much (StyleGAN2's
    lazy regularisation)."""
    lecam: float = 0.0
    """Weight of LeCam's regularisation, for small data sets."""
    lecam_decay: float = 0.99
    """Decay of its moving averages of the logits, in [0, 1)."""


@dataclass(frozen=True)
class BalanceConfig:
    """How the terms are balanced against each other."""

    kind: Literal["adaptive", "fixed", "shares"] = "adaptive"
    """adaptive: scale the adversarial term so that its gradient has adversarial.weight times the
    norm of the other terms' gradient (VQGAN, equation 7); fixed: the weights as they are; shares:
    scale every term so that its gradient's norm has its share of their sum, whatever its weight."""
    at: Literal["reconstruction", "last_layer"] = "reconstruction"
    """Where the gradients' norms are taken: at the reconstruction's pixels, or at the decoder's
    last convolution as in VQGAN (adaptive only)."""
    shares: dict[str, float] = field(default_factory=dict)
    """For shares: the target of each term in use, by the names in the log (pixel, learned,
    adversarial, vgg, lpips, gram); above 0, adding up to 1. The pixel term keeps its weight and the
    others follow it."""
    max_weight: float = 1e4
    """Upper bound of the factors."""
    smoothing: float = 0.9
    """The factors of a step follow from the norms of the steps before it, averaged exponentially
    with this decay in [0, 1); 0 takes the last step alone."""


@dataclass(frozen=True)
class PretrainedConfig:
    """Distances by a pretrained VGG16, where its weights are there."""

    weights: str | None = None
    """Weights of VGG16 with torchvision's names: a .safetensors or .pth file, or a hub id."""
    heads: str | None = None
    """For lpips_weight: the linear heads of LPIPS (vgg, version 0.1), likewise."""
    vgg_weight: float = 0.0
    """Weight of the squared difference of features (Johnson et al. 2016)."""
    lpips_weight: float = 0.0
    """Weight of LPIPS (Zhang et al. 2018)."""
    gram_weight: float = 0.0
    """Weight of the squared difference of Gram matrices (Gatys et al. 2016)."""
    layers: tuple[int, ...] = (1, 2, 3)
    """For vgg_weight and gram_weight: 0 to 4 for relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
    channels: tuple[int, ...] | None = None
    """Which three of the images' channels it looks at; null: all three, or the gray one three
    times. Has to be said for four channels."""

    @property
    def in_use(self) -> bool:
        """Whether any of them has a weight."""
        return self.vgg_weight + self.lpips_weight + self.gram_weight > 0


@dataclass(frozen=True)
class TermConfig:
    """Weight and schedule of a registered term; its own dataclass adds to them."""

    weight: float = 0.0
    """Weight of the term; 0 switches it off."""
    start_step: int = 0
    """Step at which it enters."""
    ramp_steps: int = 0
    """Steps over which its weight grows from 0."""


@dataclass(frozen=True)
class LossConfig:
    """The autoencoder's objective: a weighted sum of terms."""

    pixel: Literal["l1", "l2", "huber"] = "l1"
    """Mean absolute, mean squared or Huber error over all pixels and channels."""
    huber_delta: float = 0.1
    """Where Huber's error turns from squared to absolute, on the scale of images in [-1, 1]."""
    learned_logvar: bool = False
    """Weight the error by a learned noise level: error / exp(s) + s with a trained scalar s, as in
    latent diffusion."""
    pixel_weight: float = 1.0
    """Weight of the pixel term."""
    pixel_cutoff: float | None = None
    """Only what varies more slowly than this counts in the pixel term, in cycles per pixel (0.5 is
    the finest that a row of pixels holds), once another term that sees images is at work; null:
    everything. Finer detail is then left to the learned distance and the critic, which do not blur
    it (frequency separation, Fritsche et al. 2019)."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence against the error summed over an image, as in latent diffusion
    (whose value is 1e-6); the KL is in nats per image, and both are divided by the number of values
    in an image, so that the weight means the same at every resolution."""
    kl_ramp_steps: int = 0
    """Steps over which the KL's weight grows from 0 (annealing)."""
    free_bits: float = 0.0
    """Nats per latent value that a channel's KL may have for free, on average (Kingma et al.
    2016)."""
    penalties: dict[str, float] = field(default_factory=dict)
    """Weights of the bottleneck's other penalties by name, such as commitment; those that are not
    named weigh what the bottleneck says."""
    learned: LearnedConfig = field(default_factory=LearnedConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def weight_of(self, term: str) -> float:
        """The weight of a term by its name."""
        return term_weights(self).get(term, 0.0)


def term_names(loss: LossConfig) -> list[str]:
    """Names of the terms in use, as in the log."""
    return [name for name, weight in term_weights(loss).items() if weight > 0]


def term_weights(loss: LossConfig) -> dict[str, float]:
    """The weight of every term by its name in recipe, log and report: the one place that knows."""
    return {
        "pixel": loss.pixel_weight,
        "learned": loss.learned.weight,
        "vgg": loss.pretrained.vgg_weight,
        "lpips": loss.pretrained.lpips_weight,
        "gram": loss.pretrained.gram_weight,
        "adversarial": loss.adversarial.weight,
    } | {name: section(loss, name, kind).weight for name, kind in sections_of("loss").items()}


def loss_problems(
    loss: LossConfig, critic: CriticConfig, channels: int, resolution: int
) -> Iterator[str]:
    """What cannot work in these fields: field, value, consequence, remedy."""
    yield from _range_problems(loss, critic)
    yield from _cutoff_problems(loss)
    yield from _critic_problems(loss, critic, resolution)
    yield from _balance_problems(loss)
    yield from _pretrained_problems(loss.pretrained, channels)


def _range_problems(loss: LossConfig, critic: CriticConfig) -> Iterator[str]:
    adversarial = loss.adversarial
    positive = {
        "critic.width": critic.width,
        "critic.scales": critic.scales,
        "loss.huber_delta": loss.huber_delta,
        "loss.balance.max_weight": loss.balance.max_weight,
        "loss.adversarial.penalty_every": adversarial.penalty_every,
    }
    for name, value in positive.items():
        if not value > 0:
            yield f"{name} is {value}; it must be above 0"
    weights = {
        "critic.start_step": critic.start_step,
        "loss.pixel_weight": loss.pixel_weight,
        "loss.kl_weight": loss.kl_weight,
        "loss.kl_ramp_steps": loss.kl_ramp_steps,
        "loss.free_bits": loss.free_bits,
        "loss.learned.weight": loss.learned.weight,
        "loss.adversarial.weight": adversarial.weight,
        "loss.adversarial.gradient_penalty": adversarial.gradient_penalty,
        "loss.adversarial.clip_weights": adversarial.clip_weights,
        "loss.adversarial.r1": adversarial.r1,
        "loss.adversarial.r2": adversarial.r2,
        "loss.adversarial.lecam": adversarial.lecam,
        "loss.pretrained.vgg_weight": loss.pretrained.vgg_weight,
        "loss.pretrained.lpips_weight": loss.pretrained.lpips_weight,
        "loss.pretrained.gram_weight": loss.pretrained.gram_weight,
    }
    for name, value in weights.items():
        if not value >= 0:
            yield f"{name} is {value}; it must be 0 or above"
    shares = {
        "loss.learned.ema_decay": loss.learned.ema_decay,
        "loss.adversarial.lecam_decay": adversarial.lecam_decay,
        "loss.balance.smoothing": loss.balance.smoothing,
    }
    for name, share in shares.items():
        if not 0 <= share < 1:
            yield f"{name} is {share}; it must be at least 0 and below 1"


def _cutoff_problems(loss: LossConfig) -> Iterator[str]:
    cutoff = loss.pixel_cutoff
    if cutoff is None:
        return
    if not 0 < cutoff <= FINEST:
        yield (
            f"loss.pixel_cutoff is {cutoff}; it is in cycles per pixel, above 0 and at most "
            f"{FINEST}, where the finest pattern lies (null: no cutoff)"
        )
    if term_names(loss) == ["pixel"]:
        yield (
            f"loss.pixel_cutoff is {cutoff}, but the pixel term is the only one, so nothing would "
            "teach finer detail: set it to null, or give another term a weight"
        )


def _critic_problems(loss: LossConfig, critic: CriticConfig, resolution: int) -> Iterator[str]:
    if not 1 <= critic.layers <= 5:
        yield f"critic.layers is {critic.layers}; it must be 1 to 5"
    if critic.rests_on(loss) and resolution < critic.smallest_image:
        yield (
            f"data.resolution ({resolution}) is too small for a critic of {critic.layers} strided "
            f"layers and {critic.scales} scales, which needs {critic.smallest_image} pixels: lower "
            "critic.layers or critic.scales"
        )
    learned = loss.learned
    available = (critic.layers + 1) * critic.scales
    chosen = tuple(range(available)) if learned.layers is None else learned.layers
    for layer in chosen:
        if not 0 <= layer < available:
            yield (
                f"loss.learned.layers names layer {layer}, but a critic of {critic.layers} "
                f"strided layers has the feature maps 0 to {available - 1}"
            )
    if not chosen:
        yield "loss.learned.layers is empty: name a layer, or set loss.learned.weight to 0"
    weights = learned.layer_weights
    if weights is not None and len(weights) != len(chosen):
        yield (
            f"loss.learned.layer_weights has {len(weights)} weights for {len(chosen)} layers: give "
            "one for each"
        )
    if weights is not None and not (min(weights, default=0) >= 0 and sum(weights) > 0):
        yield f"loss.learned.layer_weights is {list(weights)}: weights are 0 or above, not all 0"
    adversarial = loss.adversarial
    if adversarial.kind == "wasserstein" and critic.rests_on(loss):
        bounds = (adversarial.gradient_penalty, adversarial.clip_weights, adversarial.r1)
        if not any(bounds) and critic.norm != "spectral":
            yield (
                "loss.adversarial.kind is wasserstein, but nothing bounds the critic, so its loss "
                "falls for ever: set loss.adversarial.gradient_penalty to 10, or "
                "loss.adversarial.clip_weights to 0.01"
            )
    if adversarial.clip_weights and critic.norm == "spectral":
        yield (
            f"loss.adversarial.clip_weights ({adversarial.clip_weights}) has no effect under "
            "critic.norm spectral, which divides the weights by their size: set one of them off"
        )


def _balance_problems(loss: LossConfig) -> Iterator[str]:
    balance = loss.balance
    if balance.kind != "shares":
        if balance.shares:
            yield (
                f"loss.balance.shares is given, but loss.balance.kind is {balance.kind}: set it to "
                "shares"
            )
        return
    used, given = term_names(loss), balance.shares
    if set(used) != set(given):
        yield (
            f"loss.balance.shares names {', '.join(given) or 'nothing'}, but the terms in use are "
            f"{', '.join(used) or 'none'}: give each of them a share"
        )
    elif "pixel" not in used:
        yield "loss.balance.kind shares needs the pixel term: raise loss.pixel_weight above 0"
    elif not min(given.values()) > 0 or abs(sum(given.values()) - 1) > 1e-6:
        yield (
            f"loss.balance.shares adds up to {sum(given.values()):g} with the least "
            f"{min(given.values()):g}: shares are above 0 and add up to 1"
        )


def _pretrained_problems(pretrained: PretrainedConfig, channels: int) -> Iterator[str]:
    if not pretrained.in_use:
        return
    if pretrained.weights is None:
        yield (
            "loss.pretrained has a weight, but loss.pretrained.weights names no file: give VGG16's "
            "weights (.safetensors or .pth, torchvision's names) or a hub id"
        )
    if pretrained.lpips_weight and pretrained.heads is None:
        yield (
            f"loss.pretrained.lpips_weight is {pretrained.lpips_weight}, but "
            "loss.pretrained.heads names no file with the linear heads of LPIPS: give it, or use "
            "vgg_weight"
        )
    if not pretrained.layers or not all(0 <= layer <= 4 for layer in pretrained.layers):
        yield f"loss.pretrained.layers is {list(pretrained.layers)}; choose from 0 to 4"
    chosen = pretrained.channels
    if chosen is None and channels not in (1, 3):
        yield (
            f"loss.pretrained.channels is not given, but VGG16 sees three channels and the images "
            f"have {channels} (model.in_channels): say which three, such as [0, 1, 2]"
        )
    if chosen is not None and (
        len(chosen) != 3 or not all(0 <= channel < channels for channel in chosen)
    ):
        yield (
            f"loss.pretrained.channels is {list(chosen)}; name three of the {channels} channels, "
            f"from 0 to {channels - 1}"
        )
