"""The objective's part of the configuration: the critic, the terms and their balance.

Every field's docstring is its `--help` text.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from first_stage.config.sections import section, sections_of
from first_stage.config.types import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    may_change,
)

CriticNorm = Literal["group", "spectral", "none"]
FeatureDistance = Literal["l1", "l2", "cosine"]
AdversarialKind = Literal["hinge", "wasserstein", "logistic", "least_squares", "relativistic"]
BalanceKind = Literal["adaptive", "fixed", "shares"]
BalancePlace = Literal["reconstruction", "last_layer"]
PixelError = Literal["l1", "l2", "huber"]

FINEST = 0.71
"""Cycles per pixel of a checkerboard, the finest pattern: half a cycle along both axes."""

if TYPE_CHECKING:
    CriticLayers = int
    Cutoff = float
else:
    from first_stage.config.types import number

    CriticLayers = number(int, "from 1 to 5", (">=", 1), ("<=", 5))
    Cutoff = number(float, f"up to {FINEST}, above 0", (">", 0), ("<=", FINEST))


@dataclass(frozen=True)
class CriticConfig:
    """The patch critic, trained beside the autoencoder."""

    width: PositiveInt = 64
    """Channels of its first layer; doubled by every further one, up to eight times."""
    layers: CriticLayers = 3
    """Strided layers; 3 sees patches of 70 pixels."""
    norm: CriticNorm = "group"
    """group: group norm after the first layer; spectral: every weight divided by its largest
    singular value; batch statistics are not offered because they mix samples and processes."""
    antialias: bool = False
    """Blur before every subsampling (Zhang 2019): features that tolerate a shift by a pixel, for
    about twice the critic's time."""
    scales: PositiveInt = 1
    """Critics beside each other, each further one on images of half the size (pix2pixHD)."""
    start_step: NonNegativeInt = 0
    """Step at which the critic begins to train; it is not run before."""
    learning_rate: PositiveFloat | None = may_change(None)
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

    weight: NonNegativeFloat = 0.5
    """Weight of the distance; 0 switches it off."""
    distance: FeatureDistance = "l1"
    """Between feature maps: mean absolute difference, mean squared difference, or 1 - cosine of the
    vectors at each place."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Which of the critic's feature maps, from 0 (finest), scale after scale; null: all."""
    layer_weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each of these layers in their weighted mean; null: all alike."""
    normalise: bool = True
    """Divide each layer's distance by the mean size of its features on reals, so that no layer
    drowns the others."""
    ema_decay: Decay = 0.0
    """Measure with an exponential moving average of the critic with this decay per step, so that
    the measure moves slowly; 0: with the critic as it is. Costs two more forward passes of the
    critic."""
    start_step: NonNegativeInt = 0
    """Step at which it enters; not before the critic has begun to train."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which its weight grows from 0."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The critic's verdict as a loss of the autoencoder, and what keeps the critic in bounds."""

    kind: AdversarialKind = "hinge"
    """The pair of losses of critic and autoencoder: hinge (Geometric GAN), wasserstein (with
    gradient_penalty 10, or with clip_weights 0.01), logistic (non-saturating), least_squares,
    relativistic (R3GAN: with r1 and r2)."""
    weight: NonNegativeFloat = 0.2
    """Weight of the autoencoder's loss: under adaptive balance the norm of its gradient relative to
    that of all other terms together. 0 trains the critic for the learned distance only."""
    start_step: NonNegativeInt = 0
    """Step at which it enters; not before the critic has begun to train."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which its weight grows from 0."""
    prior_samples: bool = False
    """The critic also sees decoded samples of the prior N(0, I) as fakes (Larsen et al. 2016);
    meant for a KL weight that keeps the posterior near it."""
    reaches_encoder: bool = True
    """Whether the adversarial gradient goes on into the encoder; false as in Larsen et al., for a
    second pass back through the decoder."""
    gradient_penalty: NonNegativeFloat = 0.0
    """Weight of the gradient penalty on lines between reals and fakes (WGAN-GP; 10 there)."""
    clip_weights: NonNegativeFloat = 0.0
    """Clamp the critic's weights to this after each of its updates (WGAN; 0.01 there); 0: off."""
    r1: NonNegativeFloat = 0.0
    """Weight gamma of the squared slope on reals, halved (R1)."""
    r2: NonNegativeFloat = 0.0
    """Weight gamma of the squared slope on fakes, halved (R2)."""
    penalty_every: PositiveInt = 1
    """Steps between penalties on the slope, which then count that many times as much (StyleGAN2's
    lazy regularisation)."""
    lecam: NonNegativeFloat = 0.0
    """Weight of LeCam's regularisation, for small data sets."""
    lecam_decay: Decay = 0.99
    """Decay of its moving averages of the logits."""


@dataclass(frozen=True)
class BalanceConfig:
    """How the terms are balanced against each other."""

    kind: BalanceKind = "adaptive"
    """adaptive: scale the adversarial term so that its gradient has adversarial.weight times the
    norm of the other terms' gradient (VQGAN, equation 7); fixed: the weights as they are; shares:
    rescale each term so that its gradient norm is the given fraction of the sum of all terms'
    gradient norms; weights are ignored."""
    at: BalancePlace = "reconstruction"
    """Where the gradients' norms are taken: at the reconstruction's pixels, or at the decoder's
    last convolution as in VQGAN (adaptive only)."""
    shares: dict[str, PositiveFloat] = field(default_factory=dict)
    """For shares: the target of each term in use, by the names in the log (pixel, learned,
    adversarial, vgg, lpips, gram); above 0, adding up to 1. The pixel term keeps its weight and the
    others follow it."""
    max_weight: PositiveFloat = 1e4
    """Upper bound of the factors."""
    smoothing: Decay = 0.9
    """The factors of a step follow from the norms of the steps before it, averaged exponentially
    with this decay; 0 takes the last step alone."""


@dataclass(frozen=True)
class PretrainedConfig:
    """Distances by a pretrained VGG16, where its weights are there."""

    weights: str | None = None
    """Weights of VGG16 with torchvision's names: a .safetensors or .pth file, or a hub id."""
    heads: str | None = None
    """For lpips_weight: the linear heads of LPIPS (vgg, version 0.1), likewise."""
    vgg_weight: NonNegativeFloat = 0.0
    """Weight of the squared difference of features (Johnson et al. 2016)."""
    lpips_weight: NonNegativeFloat = 0.0
    """Weight of LPIPS (Zhang et al. 2018)."""
    gram_weight: NonNegativeFloat = 0.0
    """Weight of the squared difference of Gram matrices (Gatys et al. 2016)."""
    layers: tuple[NonNegativeInt, ...] = (1, 2, 3)
    """For vgg_weight and gram_weight: 0 to 4 for relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
    channels: tuple[NonNegativeInt, ...] | None = None
    """Which three of the images' channels it looks at; null: all three, or the gray one three
    times. Has to be said for four channels."""

    @property
    def in_use(self) -> bool:
        """Whether any of them has a weight."""
        return self.vgg_weight + self.lpips_weight + self.gram_weight > 0


@dataclass(frozen=True)
class TermConfig:
    """Weight and schedule of a registered term; its own dataclass adds to them."""

    weight: NonNegativeFloat = 0.0
    """Weight of the term; 0 switches it off."""
    start_step: NonNegativeInt = 0
    """Step at which it enters."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which its weight grows from 0."""


@dataclass(frozen=True)
class LatentTermConfig(TermConfig):
    """The same of a term of the latents, which has no share of the gradient at the pixels."""


@dataclass(frozen=True)
class LossConfig:
    """The autoencoder's objective: a weighted sum of terms."""

    pixel: PixelError = "l1"
    """Mean absolute, mean squared or Huber error over all pixels and channels."""
    huber_delta: PositiveFloat = 0.1
    """Where Huber's error turns from squared to absolute, on the scale of images in [-1, 1]."""
    learned_logvar: bool = False
    """Weight the error by a learned noise level: error / exp(s) + s with a trained scalar s, as in
    latent diffusion."""
    pixel_weight: NonNegativeFloat = 1.0
    """Weight of the pixel term."""
    pixel_cutoff: Cutoff | None = None
    """Only what varies more slowly than this counts in the pixel term, in cycles per pixel (0.5 is
    the finest that a row of pixels holds), once another term that sees images is at work; null:
    everything. Finer detail is then left to the learned distance and the critic, which do not blur
    it (frequency separation, Fritsche et al. 2019)."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the KL divergence against the error summed over an image, as in latent diffusion
    (whose value is 1e-6); the KL is in nats per image, and both are divided by the number of values
    in an image, so that the weight means the same at every resolution."""
    kl_ramp_steps: NonNegativeInt = 0
    """Steps over which the KL's weight grows from 0 (annealing)."""
    free_bits: NonNegativeFloat = 0.0
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
    """Names of the terms in use that see the pixels, as in the log."""
    latent = latent_term_names(loss)
    return [name for name, weight in term_weights(loss).items() if weight > 0 if name not in latent]


def latent_term_names(loss: LossConfig) -> list[str]:
    """Names of the terms in use that see the latents, as in the log."""
    registered = sections_of("loss").items()
    kinds = [name for name, kind in registered if issubclass(kind, LatentTermConfig)]
    return [name for name in kinds if term_weights(loss)[name] > 0]


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
