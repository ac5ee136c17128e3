"""Which codes a discrete first stage uses on images."""

from collections.abc import Callable

import torch
from torch import Tensor

from first_stage.metrics.precision import float64_device
from first_stage.models.codebooks import Discrete
from first_stage.models.first_stage import FirstStage
from first_stage.models.quantizers import perplexity


class CodeCounts:
    """How often each code is used; empty for a first stage without codes.

    Args:
        stage: The first stage.

    Attributes:
        counts: `(K,)` float64 on the first stage's device, where that has float64; `None` without
            codes.
    """

    def __init__(self, stage: FirstStage):
        self.bottleneck = stage.bottleneck
        self.counts: Tensor | None = None
        if isinstance(self.bottleneck, Discrete):
            count = len(self.bottleneck.usage)
            self.counts = torch.zeros(
                count, dtype=torch.float64, device=float64_device(stage.device)
            )

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Count the codes of handed-over latents `(B, D, h, w)`."""
        if self.counts is None or not isinstance(self.bottleneck, Discrete):
            return
        tokens = self.bottleneck.tokens(latents).flatten()
        self.counts += torch.bincount(tokens, minlength=len(self.counts)).to(self.counts.device)

    def summary(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Share of the codes that were used, perplexity, and the most frequent code's share.

        Args:
            total: The sum of a tensor over processes.
        """
        if self.counts is None:
            return {}
        counts = total(self.counts)
        shares = counts / counts.sum().clamp_min(1)
        return {
            "used": (counts > 0).double().mean().item(),
            "perplexity": perplexity(shares).item(),
            "most_frequent": shares.max().item(),
        }
