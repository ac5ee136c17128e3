"""Matched pairs of critic loss and autoencoder loss.

Both functions of a pair take the logits of reals and of fakes, `(B, S, h, w)` with a channel per
scale of the critic, and return a scalar: the mean over images, scales and patches. A generator loss
must only be differentiated with respect to the fakes.

Adding one: a pair of functions, an entry in `PAIRS`, a name in `AdversarialConfig.kind`, and a test
with numbers computed by hand.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from first_stage.config.losses import LossConfig
from first_stage.losses.terms import Inputs, Surroundings, Term, schedule


class AdversarialPair(NamedTuple):
    """A critic's loss and the loss of its opponent, from the same paper.

    Attributes:
        critic: `(real_logits, fake_logits)` to the loss that the critic minimizes.
        generator: `(real_logits, fake_logits)` to the loss that the autoencoder minimizes.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


def hinge_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))].

    Lim & Ye 2017, "Geometric GAN", equation 17.
    """
    return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()


def hinge_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[D(G(z))]: linear, so that its gradient does not vanish where the critic is sure.

    Lim & Ye 2017, "Geometric GAN", equation 18. The reals' logits play no part.
    """
    return -fake_logits.mean()


def wasserstein_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[D(G(z))] - E[D(x)].

    Arjovsky et al. 2017, "Wasserstein GAN", equation 2. It means something only for a critic whose
    slope is bounded: by `clip_weights` as in that paper, or by the gradient penalty.
    """
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[D(G(z))].

    Arjovsky et al. 2017, "Wasserstein GAN", equation 3. The reals' logits play no part.
    """
    return -fake_logits.mean()


def logistic_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[log s(D(x))] - E[log(1 - s(D(G(z))))] with the logistic function s.

    Goodfellow et al. 2014, "Generative adversarial nets", equation 1, in terms of logits.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def logistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[log s(D(G(z)))]: the non-saturating loss.

    Goodfellow et al. 2014, "Generative adversarial nets", section 3. The reals' logits play no
    part.
    """
    return F.softplus(-fake_logits).mean()


def least_squares_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2.

    Mao et al. 2017, "Least squares generative adversarial networks", equation 9. The critic decides
    at 1/2, not at 0.
    """
    return 0.5 * ((real_logits - 1.0).square().mean() + fake_logits.square().mean())


def least_squares_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[(D(G(z)) - 1)^2] / 2.

    Mao et al. 2017, "Least squares generative adversarial networks", equation 9. The reals' logits
    play no part.
    """
    return 0.5 * (fake_logits - 1.0).square().mean()


def relativistic_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[softplus(-(D(x) - D(G(z))))], patch by patch of an image and its own reconstruction.

    Huang et al. 2024, "The GAN is dead; long live the GAN!" (R3GAN), equation 2 with f(t) =
    -log(1 + e^-t). The paper adds R1 and R2, without which it need not converge.
    """
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[softplus(-(D(G(z)) - D(x)))].

    Huang et al. 2024, "The GAN is dead; long live the GAN!" (R3GAN), equation 2.
    """
    return F.softplus(real_logits - fake_logits).mean()


PAIRS: dict[str, AdversarialPair] = {
    "hinge": AdversarialPair(hinge_critic, hinge_generator),
    "wasserstein": AdversarialPair(wasserstein_critic, wasserstein_generator),
    "logistic": AdversarialPair(logistic_critic, logistic_generator),
    "least_squares": AdversarialPair(least_squares_critic, least_squares_generator),
    "relativistic": AdversarialPair(relativistic_critic, relativistic_generator),
}

BOUNDARIES: dict[str, float] = {"least_squares": 0.5}
"""The logit above which a critic calls an image real, where it is not 0."""


class Adversarial(Term):
    """The critic's verdict on what was decoded, as a loss of the autoencoder."""

    name, needs_critic = "adversarial", True

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        self.config = config.adversarial
        self.pair = PAIRS[self.config.kind]

    def value(self, inputs: Inputs) -> Tensor:
        """The generator loss of the pair: a mean over images, scales and patches."""
        assert inputs.critic is not None  # `needs_critic`
        reals, fakes = inputs.critic.logits
        return self.pair.generator(reals.detach(), fakes)

    def ramp(self, step: int) -> float:
        """As the recipe schedules it."""
        return schedule(step, self.config.start_step, self.config.ramp_steps)
