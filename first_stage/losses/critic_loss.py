"""The critic's loss: its side of the adversarial pair, and what keeps it in bounds."""

import torch
from torch import Tensor

from first_stage.config.losses import AdversarialConfig
from first_stage.losses import penalties
from first_stage.losses.adversarial import BOUNDARIES, PAIRS
from first_stage.losses.lagged_means import LaggedMeans
from first_stage.losses.terms import CriticOutputs
from first_stage.metrics.training import critic_log


class CriticLoss:
    """What the critic minimizes on a micro-batch.

    Args:
        config: The pair, and the penalties' weights.
        means: Holds LeCam's moving averages of the logits.
    """

    def __init__(self, config: AdversarialConfig, means: LaggedMeans):
        self.config, self.means = config, means
        self.pair = PAIRS[config.kind]

    def loss(self, outputs: CriticOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss without the penalties on the critic's slope.

        Args:
            outputs: Its outputs; the fakes' gradient must not reach the autoencoder, which the
                detached pixels see to.

        Returns:
            The loss and scalars for the log.
        """
        reals, fakes = outputs.logits
        loss = self.pair.critic(reals, fakes)
        log = {"loss/critic": loss.detach()}
        weight = self.config.lecam
        if weight > 0:
            self.means.observe("logit/real", reals.mean())
            self.means.observe("logit/fake", fakes.mean())
            real_mean, fake_mean = self.means.get("logit/real"), self.means.get("logit/fake")
            if real_mean is not None and fake_mean is not None:
                penalty = penalties.lecam(reals, fakes, real_mean, fake_mean)
                log["penalty/lecam"] = penalty.detach()
                loss = loss + weight * penalty
        boundary = BOUNDARIES.get(self.config.kind, 0.0)
        return loss, log | critic_log(reals, fakes, boundary)

    def penalizes(self, step: int) -> bool:
        """Whether `penalty` has anything to say in a step."""
        c = self.config
        return (c.gradient_penalty + c.r1 + c.r2) > 0 and step % c.penalty_every == 0

    def penalty(
        self, to_logits: penalties.ToLogits, images: Tensor, decoded: Tensor, mix: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted penalties on the critic's slope, on one micro-batch.

        Args:
            to_logits: The critic's logits, in float32.
            images: `(B, C, H, W)`, the reals.
            decoded: What was decoded, `(n, C, H, W)`; its first rows are the fakes.
            mix: `(B,)` uniform in [0, 1], for the interpolates.

        Returns:
            The penalties' weighted sum and scalars for the log.
        """
        c = self.config
        fakes = decoded.detach()[: len(images)]
        found = {}
        if c.gradient_penalty > 0:
            value = penalties.gradient_penalty(to_logits, images, fakes, mix)
            found["gradient"] = (c.gradient_penalty, value)
        if c.r1 > 0:
            found["r1"] = (c.r1, penalties.zero_centered_penalty(to_logits, images))
        if c.r2 > 0:
            found["r2"] = (c.r2, penalties.zero_centered_penalty(to_logits, fakes))
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        log = {f"penalty/{name}": value.detach() for name, (_, value) in found.items()}
        return c.penalty_every * total, log
