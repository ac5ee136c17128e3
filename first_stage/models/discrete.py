"""What discrete bottlenecks share: tokens, what is used of them, the way into the stock class.

The encoder gives vectors, each is replaced by the nearest entry of a codebook, and the entry's
number is a *token*. Diffusers' own quantizer in `VQModel` weighs the wrong term with its beta,
restarts nothing and reports no usage; `codebooks` and `grids` train, and `bake` writes what they
learned into the stock class, which then finds the same codes.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from first_stage.distributed.processes import Processes
from first_stage.models.bottlenecks import Bottleneck
from first_stage.models.quantizers import nearest, perplexity

_USAGE_DECAY = 0.99
_WINDOW = 100
"""Steps over which a code counts as used; about what the average of the shares looks back."""


class Discrete(Bottleneck):
    """What codebooks and grids share: tokens, usage, and the way into the stock class.

    Args:
        codes: Number of codes (K).

    Attributes:
        usage: `(K,)` share of each code, averaged exponentially over steps and processes.
        age: `(K,)` steps since each code was used; infinite for one that never was.
    """

    usage: Tensor
    age: Tensor

    def __init__(self, codes: int):
        super().__init__()
        self.register_buffer("usage", torch.zeros(codes))
        self.register_buffer("age", torch.full((codes,), math.inf))
        self._counts: Tensor | None = None
        self._seen: list[Tensor] = []

    def table(self) -> Tensor:
        """The codebook `(K, D)` as the stock class holds it; with a graph where it is learned."""
        raise NotImplementedError  # abstract

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """Numbers of the codes of handed-over latents `(B, D, h, w)`: `(B, h, w)` int64."""
        found = nearest(to_rows(latents).float(), self.table().float())
        return found.view(len(latents), *latents.shape[2:])

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """The latents that tokens `(B, h, w)` stand for, `(B, D, h, w)`, ready for the decoder."""
        return rearrange(self.table()[tokens], "b h w d -> b d h w")

    def settle(self, latents: Tensor) -> Tensor:
        """The nearest code of each place."""
        return self.from_tokens(self.tokens(latents))

    @torch.no_grad()
    def bake(self, model: nn.Module) -> None:
        """Write the table into `VQModel.quantize`."""
        model.quantize.embedding.weight.copy_(self.table())  # type: ignore[union-attr, operator]

    def _facts(self) -> dict[str, Tensor]:
        """What the steps before this one used; the same for every micro-batch and process."""
        used = self.age < _WINDOW
        return {
            "codes/used": used.float().mean(),
            "codes/dead": (~used).float().sum(),
            "codes/perplexity": perplexity(self.usage),
            "codes/most_frequent": self.usage.max(),
        }

    @torch.no_grad()
    def _note(self, tokens: Tensor) -> None:
        """Remember what a micro-batch used, until `finish_step`."""
        counts = torch.zeros_like(self.usage)
        counts.index_add_(0, tokens, counts.new_ones(len(tokens)))
        self._counts = counts if self._counts is None else self._counts + counts

    @torch.no_grad()
    def finish_step(self, step: int, processes: Processes, seed: int) -> Mapping[str, Tensor]:
        """Take in what this step used, over all processes; move codes that nothing uses."""
        if self._counts is None:
            return {}
        counts, seen = processes.sum(self._counts), self._seen
        self._counts, self._seen = None, []
        self.usage.lerp_(counts / counts.sum().clamp_min(1), 1.0 if step == 0 else 1 - _USAGE_DECAY)
        self.age.copy_(torch.where(counts > 0, 0, self.age + 1))
        return self._adapt(step, counts, seen, processes, seed)

    def _adapt(
        self, step: int, counts: Tensor, seen: Sequence[Tensor], processes: Processes, seed: int
    ) -> Mapping[str, Tensor]:
        """What else follows from the uses `(K,)` in this step; rows of parameters that jumped."""
        return {}


def to_rows(latents: Tensor) -> Tensor:
    """The vectors of latents `(B, D, h, w)`: `(B h w, D)`."""
    return rearrange(latents, "b d h w -> (b h w) d").contiguous()


def to_places(rows: Tensor, like: Tensor) -> Tensor:
    """Vectors `(B h w, D)` as latents `(B, D, h, w)`, whose shape but for D is that of `like`."""
    b, _, h, w = like.shape
    return rearrange(rows, "(b h w) d -> b d h w", b=b, h=h, w=w)


def per_sample(values: Tensor, batch: int) -> Tensor:
    """Mean of what each place has `(B h w, ...)` over a sample: `(B,)`."""
    return values.view(batch, -1).mean(1)
