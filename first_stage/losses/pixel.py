"""The pixel term: how far apart images and reconstructions are, value by value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from first_stage.config.losses import LossConfig, PixelError
from first_stage.losses.terms import Inputs, Surroundings, Term
from first_stage.metrics.spectrum import low_pass


def pixel_error(
    reconstruction: Tensor,
    images: Tensor,
    kind: PixelError,
    delta: float = 0.1,
    cutoff: float | None = None,
) -> Tensor:
    """Error over batch, channels and pixels: a mean.

    Args:
        reconstruction: `(B, C, H, W)`.
        images: `(B, C, H, W)` in [-1, 1].
        kind: `l1` (absolute), `l2` (squared), or `huber`: e^2 / (2 delta) up to delta and |e| -
            delta / 2 beyond, so that its slope is that of `l1` there.
        delta: Of `huber`.
        cutoff: Only the part of the difference below this many cycles per pixel counts.
    """
    error = reconstruction - images
    if cutoff is not None:
        error = low_pass(error, cutoff)
    if kind == "huber":
        return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta
    return error.abs().mean() if kind == "l1" else error.square().mean()


class Pixel(Term):
    """The pixel error; on request with a learned noise level, as in latent diffusion."""

    name = "pixel"

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        super().__init__(config, surroundings)
        self.loss = config
        self.logvar: nn.Parameter | None = None
        if config.learned_logvar:
            self.logvar = nn.Parameter(torch.zeros((), device=surroundings.device))

    def value(self, inputs: Inputs) -> Tensor:
        """Mean over batch, channels and pixels; over exp(s) for a learned noise level s."""
        error = self._error(inputs, inputs.rebuilt)
        return error if self.logvar is None else error * (-self.logvar.detach()).exp()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The noise level s, where it is learned."""
        return {} if self.logvar is None else {"logvar": self.logvar}

    def own_loss(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]] | None:
        """weight (error / exp(s) + s), of which only s gets a gradient here."""
        if self.logvar is None:
            return None
        error = self._error(inputs, inputs.rebuilt.detach())
        loss = self.weight * (error * (-self.logvar).exp() + self.logvar)
        return loss, {"noise/logvar": self.logvar.detach().clone()}

    def _error(self, inputs: Inputs, rebuilt: Tensor) -> Tensor:
        """It leaves fine detail to others only once one of them is at work."""
        loss = self.loss
        relieved = any(term.strength(inputs.step) > 0 for term in self.others)
        cutoff = loss.pixel_cutoff if relieved else None
        return pixel_error(rebuilt, inputs.images, loss.pixel, loss.huber_delta, cutoff)
