"""The losses that do not pass through the pixels: what the bottleneck's latents cost."""

from collections.abc import Mapping

import torch
from torch import Tensor

from first_stage.config.losses import LossConfig
from first_stage.errors import ConfigError
from first_stage.losses.lagged_means import LaggedMeans
from first_stage.losses.terms import schedule
from first_stage.models.bottlenecks import Code


class LatentLoss:
    """The weighted penalties of a bottleneck.

    `kl` has fields of its own in the recipe (weight, ramp, free bits); every other penalty weighs
    what `loss.penalties` says by its name, or what its bottleneck says.

    Args:
        config: Weights.
        means: Holds what free bits are decided by.
        defaults: The bottleneck's own weights by name.

    Raises:
        ConfigError: When `loss.penalties` names one that the bottleneck does not have.
    """

    def __init__(self, config: LossConfig, means: LaggedMeans, defaults: Mapping[str, float]):
        self.config, self.means = config, means
        self.weights = {**defaults, **config.penalties}
        for name in config.penalties:
            if name not in defaults:
                there = ", ".join(defaults) or "none"
                raise ConfigError(
                    f"loss.penalties names {name!r}, but this first stage's bottleneck has: {there}"
                )

    def loss(self, step: int, images: Tensor, code: Code) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the penalties.

        Args:
            step: The step, for the schedule.
            images: `(B, C, H, W)`, for the number of their values.
            code: Of the images, with the encoder's graph.

        Returns:
            A scalar, and scalars for the log: `loss/<penalty>` as means over the batch (`loss/kl`
            in nats per image), and the bottleneck's facts.
        """
        total = code.latents.new_zeros(())
        log = {name: value.detach() for name, value in code.facts.items()}
        for name, values in code.penalties.items():
            value = values.mean()
            log[f"loss/{name}"] = value.detach()
            if name == "kl":
                total = total + self._kl_weight(step, images) * self._kl(value, code)
            else:  # at weight 0 too: every parameter has a gradient then, as processes expect
                total = total + self.weights.get(name, 0.0) * value
        return total, log

    def _kl_weight(self, step: int, images: Tensor) -> float:
        """Against an error summed over an image, as in latent diffusion, per value of an image."""
        ramp = schedule(step, 0, self.config.kl_ramp_steps)
        return self.config.kl_weight * ramp / images[0].numel()

    def _kl(self, kl: Tensor, code: Code) -> Tensor:
        """The KL in nats per image; beyond the free bits where there are any."""
        if self.config.free_bits <= 0:
            return kl
        by_channel = code.facts["kl_channel"]
        return self._beyond_free_bits(by_channel) * code.latents[0, 0].numel()

    def _beyond_free_bits(self, by_channel: Tensor) -> Tensor:
        """Sum over channels of max(free bits, KL), in nats per latent place.

        Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow",
        equation 15. Which channels are below is decided by the mean over earlier steps, so that it
        does not depend on how a batch is split.
        """
        self.means.observe("kl", by_channel)
        earlier = self.means.get("kl")
        if earlier is None:
            return by_channel.sum()
        free = torch.full_like(by_channel, self.config.free_bits)
        return torch.where(earlier > free, by_channel, free).sum()
