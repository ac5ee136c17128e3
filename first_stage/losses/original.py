"""Holding latents to those of the first stage that a run began from."""

from dataclasses import dataclass

from torch import Tensor

from first_stage.config.losses import LatentTermConfig, LossConfig
from first_stage.errors import ConfigError
from first_stage.losses.terms import LatentTerm, Surroundings
from first_stage.metrics.latents import gaussian_divergence
from first_stage.models.bottlenecks import Code, Encoded
from first_stage.models.original import OriginalEncoder


@dataclass(frozen=True)
class OriginalConfig(LatentTermConfig):
    """KL to the posterior of model.pretrained's own encoder instead of N(0, I) (AlphaVAE): what
    latents mean drifts little, so that a diffusion model goes on working. Weighted like kl_weight,
    which it takes the place of."""


class Original(LatentTerm):
    """KL(q(z|x) || q_0(z|x)), q_0 the posterior of the encoder that the run began from.

    As AlphaVAE has it for RGBA (2507.09308). Without posteriors it is half the squared distance of
    the latents: the same of two Gaussians of variance 1.

    Raises:
        ConfigError: When the run did not begin from a pretrained first stage.
    """

    name, section = "original", OriginalConfig

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        if surroundings.original is None:
            raise ConfigError(
                f"loss.original.weight is {self.weight:g}, but there is no original encoder to hold"
                " latents to: give model.pretrained, or set it to 0"
            )
        self.encoder: OriginalEncoder = surroundings.original
        self.autocast = surroundings.autocast

    def latent_value(self, code: Code, images: Tensor) -> Tensor | None:
        """In nats per image over the number of an image's values, as the KL; a mean over samples.

        `None` once the encoder learns no more.
        """
        if not code.signal.requires_grad:
            return None
        with self.autocast():
            original = self.encoder(images)
        return divergence(code, original, self.encoder.held) / images[0].numel()


def divergence(code: Code, original: Encoded, channels: int) -> Tensor:
    """KL from posteriors to the original ones, or half the squared distance without them.

    Args:
        code: With the encoder's graph.
        original: Of the same images.
        channels: Only the first so many latent channels are held; others were added later.

    Returns:
        Nats per image, a mean over samples.
    """
    mean, other = code.signal[:, :channels], original.latents[:, :channels]
    if code.logvar is None or original.logvar is None:
        values = 0.5 * (mean - other).square()
    else:
        values = gaussian_divergence(
            mean, code.logvar[:, :channels], other, original.logvar[:, :channels]
        )
    return values.flatten(1).sum(1).mean()
