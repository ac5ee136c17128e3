"""What lies between encoder and decoder: from the encoder's output to the latents to decode.

A bottleneck is one of three orthogonal parts of a first stage (see `families` for the other two).
Its `forward` is what training uses: latents with a gradient, penalties by name, facts for the log.
Its `encode` is what everything else uses: latents as they are handed over, without a draw.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from first_stage.distributed.processes import Processes
from first_stage.metrics.latents import kl_divergence

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
"""What a posterior's log-variance is clamped to, as in diffusers."""


class Encoded(NamedTuple):
    """Latents of images, as they are handed over.

    Attributes:
        latents: `(B, C, h, w)` float32: the posterior's mode, or what a first stage without a
            posterior gives; before quantization, where there is a codebook.
        logvar: Natural logarithm of the posterior's variance, of the same shape; `None` without
            one.
    """

    latents: Tensor
    logvar: Tensor | None = None

    @property
    def moments(self) -> Tensor:
        """`(B, 2C, h, w)`, mean and then log-variance; the latents alone without a posterior."""
        return self.latents if self.logvar is None else torch.cat([self.latents, self.logvar], 1)


class Code(NamedTuple):
    """What a bottleneck makes of an encoder's output in training.

    Attributes:
        latents: `(B, C, h, w)` float32, what the decoder takes: drawn, quantized or as they came.
        penalties: By name, `(B,)` each with a graph: what the encoder pays for its latents. The
            objective weights them by these names.
        facts: By name, scalars or `(C,)`: what the log says of the latents.
        mean: The latents without the noise of the draw, with their graph; `None` where no noise is
            drawn.
        logvar: Natural logarithm of the posterior's variance, with its graph; `None` without one.
    """

    latents: Tensor
    penalties: Mapping[str, Tensor]
    facts: Mapping[str, Tensor]
    mean: Tensor | None = None
    logvar: Tensor | None = None

    @property
    def signal(self) -> Tensor:
        """The latents `(B, C, h, w)` without the noise of the draw."""
        return self.latents if self.mean is None else self.mean


class Bottleneck(nn.Module):
    """From an encoder's output to latents. Subclass it, and give it to a family.

    Attributes:
        weights: What each penalty weighs where the recipe says nothing (`loss.penalties`).
    """

    weights: ClassVar[Mapping[str, float]] = {}

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The latents to decode in training, with their penalties.

        Args:
            output: What the family's encoder gave, float32.
            noise: `(B, C, h, w)` standard normal for a bottleneck that draws; `None`: no draw.
        """
        raise NotImplementedError  # abstract

    def encode(self, output: Tensor) -> Encoded:
        """The latents as they are handed over: no draw, and not quantized."""
        return Encoded(output)

    def settle(self, latents: Tensor) -> Tensor:
        """Handed-over latents `(B, C, h, w)` as the decoder takes them: quantized, if they are."""
        return latents

    def finish_step(self, step: int, processes: Processes, seed: int) -> Mapping[str, Tensor]:
        """Called on every process after each update of the weights, before they are averaged.

        Args:
            step: Steps done before this one.
            processes: Those of the job.
            seed: The run's seed.

        Returns:
            Rows of its parameters that jumped, by the parameter's name: a mask `(rows,)`. The
            average of the weights takes these rows as they are.
        """
        return {}

    def bake(self, model: nn.Module) -> None:
        """Write what this bottleneck has learned into the diffusers model, before it is saved."""


class Gaussian(Bottleneck):
    """A diagonal Gaussian q(z | x) over the latents: Kingma & Welling 2014.

    The encoder gives `(B, 2C, h, w)`, mean and log-variance.
    """

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """`mean + std * noise`; the penalty `kl` is KL(q(z|x) || N(0, I)) in nats per image.

        Kingma & Welling 2014, appendix B. The fact `kl_channel` is the same by channel in nats per
        latent value, a mean over batch and places; it keeps its graph, for free bits.
        """
        mean, logvar = self.encode(output)
        assert logvar is not None  # a Gaussian has one
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        kl = kl_divergence(mean, logvar)
        facts = {"kl_channel": kl.mean((0, 2, 3)), **signal_facts(mean, logvar)}
        return Code(latents, {"kl": kl.flatten(1).sum(1)}, facts, mean, logvar)

    def encode(self, output: Tensor) -> Encoded:
        """Mean and clamped log-variance."""
        mean, logvar = output.chunk(2, dim=1)
        return Encoded(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))


class Plain(Bottleneck):
    """The encoder's output is the latents: no draw, no posterior.

    The penalty `magnitude` is the mean square of a sample's latents: a pull that gives them a scale
    where nothing else does.
    """

    weights: ClassVar[Mapping[str, float]] = {"magnitude": 0.0}

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The latents as they are; `noise` plays no part."""
        return Code(output, {"magnitude": output.square().flatten(1).mean(1)}, {})


@torch.no_grad()
def signal_facts(mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """What tells whether a channel is active: mean and mean square of its posteriors' means, and
    their mean variance, `(C,)` each over batch and places (see `metrics.latents.active`).
    """
    axes = (0, 2, 3)
    return {
        "signal_mean": mean.mean(axes),
        "signal_square": mean.square().mean(axes),
        "noise_square": logvar.exp().mean(axes),
    }
