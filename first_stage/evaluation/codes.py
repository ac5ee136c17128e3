"""Which codes a discrete first stage uses on images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from first_stage.metrics.precision import float64_device
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage
from first_stage.models.quantizers import perplexity

_POINTS = 256


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
        shares = self.shares(total)
        return {} if shares is None else usage(shares)

    def shares(self, total: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Each code's share of the tokens, `(K,)`; `None` without codes.

        Args:
            total: The sum of a tensor over processes.
        """
        if self.counts is None:
            return None
        counts = total(self.counts)
        return counts / counts.sum().clamp_min(1)


def usage(shares: Tensor) -> dict[str, float]:
    """What a distribution over codes `(K,)` comes to, by name."""
    return {
        "used": (shares > 0).double().mean().item(),
        "perplexity": perplexity(shares).item(),
        "most_frequent": shares.max().item(),
    }


def by_use(shares: Tensor) -> list[list[float]]:
    """Shares from the most used code to the least, `[[rank, share], ...]`, ranks from 1.

    Args:
        shares: `(K,)`; more than 256 are averaged in groups of neighbors.
    """
    ordered = shares.cpu().sort(descending=True).values
    groups = ordered.split(math.ceil(len(ordered) / _POINTS))
    ends = torch.tensor([len(group) for group in groups]).cumsum(0)
    return [[int(end), float(group.mean())] for end, group in zip(ends, groups, strict=True)]
