"""Discrete bottlenecks: learned codebooks and finite grids.

The encoder gives vectors, each is replaced by the nearest entry of a codebook, and the entry's
number is a *token*. Diffusers' own quantizer in `VQModel` weighs the wrong term with its beta,
restarts nothing and reports no usage; these train, and `bake` writes what they learned into the
stock class, which then finds the same codes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.distributed.processes import Processes
from first_stage.metrics.precision import full_float32
from first_stage.models.bottlenecks import Bottleneck, Code
from first_stage.models.quantizers import (
    grid,
    nearest,
    perplexity,
    rotate,
    round_to_grid,
    straight_through,
)
from first_stage.seeding import Purpose, generator, to_device

Rule = Literal["euclidean", "cosine", "linear"]
Gradient = Literal["straight_through", "rotation"]

_RESTARTS_AT_ONCE = 64
_USAGE_DECAY = 0.99
_RECENT_DECAY = 0.9
"""Of the shares that a grid's entropy is taken from. Vectors move away from where the crowd was:
with 0.99 they run after each other, and few codes are used at a time."""
_WINDOW = 100
"""Steps over which a code counts as used; about what the average of the shares looks back."""
_RARE = 0.1
"""Added to each share of a grid's codes, in units of 1/K, so that those never used have a log."""


@dataclass(frozen=True)
class CodebookConfig:
    """A learned codebook (van den Oord et al. 2017)."""

    codes: PositiveInt = 1024
    """Number of codes (K)."""
    rule: Rule | None = None
    """euclidean: the nearest of K free vectors; cosine: of K directions, whatever a vector's length
    (ViT-VQGAN); linear: of K frozen random vectors through one learned matrix (SimVQ, Zhu et al.
    2024), which keeps every code in use; null: linear above 1024 codes, else euclidean."""
    gradient: Gradient = "straight_through"
    """How the decoder's gradient passes a code: copied, or turned as the vector was (rotation
    trick, Fifty et al. 2024)."""
    restart_after: NonNegativeInt = 200
    """Steps without use after which a free code is moved to a vector of the batch; 0: never."""


@dataclass(frozen=True)
class GridConfig:
    """A finite grid instead of a codebook (FSQ, Mentzer et al. 2023)."""

    levels: tuple[PositiveInt, ...] = (8, 5, 5, 5)
    """Values on each axis; their product is the number of codes, their count the latent channels.
    8,5,5,5 has 1,000 codes, 7,5,5,5,5 has 4,375, 8,8,8,6,5 has 15,360."""


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
        found = nearest(_rows(latents).float(), self.table().float())
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


class Codebook(Discrete):
    """A learned codebook with van den Oord's two losses.

    van den Oord et al. 2017, "Neural discrete representation learning", equation 3: `codebook` is
    |sg(z) - e|^2, which moves codes to vectors; `commitment` is |z - sg(e)|^2, weighted with beta,
    which moves vectors to codes. Both are means over a sample's latent values.

    With the rule cosine, z is divided by its length before it is compared, quantized and put into
    `codebook`; `commitment` takes it as it is, so that the lengths, which nothing else holds, stay
    near 1.

    Args:
        codes: Number of codes (K).
        dimensions: Of a code (D).
        rule: As in `CodebookConfig`.
        gradient: As in `CodebookConfig`.
        restart_after: As in `CodebookConfig`; a linear codebook restarts nothing.
        table: Codes to start from, `(K, D)`; drawn at random when `None`.

    Attributes:
        idle: `(K,)` steps since each code was used or moved; only where codes are restarted.
    """

    weights: ClassVar[Mapping[str, float]] = {"codebook": 1.0, "commitment": 0.25}
    idle: Tensor

    def __init__(
        self,
        codes: int,
        dimensions: int,
        rule: Rule = "euclidean",
        gradient: Gradient = "straight_through",
        restart_after: int = 0,
        table: Tensor | None = None,
    ):
        super().__init__(codes)
        self.rule, self.gradient, self.is_new = rule, gradient, table is None
        self.restart_after = 0 if rule == "linear" else restart_after
        if table is None:
            table = torch.randn(codes, dimensions) / math.sqrt(dimensions)
        if rule == "linear":
            self.register_buffer("frozen", table.clone())
            self.matrix = nn.Parameter(torch.eye(dimensions))
        else:
            self.codes = nn.Parameter(table.clone())
        if self.restart_after:
            self.register_buffer("idle", torch.zeros(codes))
        self.to(table.device)

    def table(self) -> Tensor:
        """`(K, D)`: the codes; of unit length for cosine; through the matrix for linear."""
        if self.rule == "linear":
            # In float32 whatever autocast computes in: the exported codes are these.
            with torch.autocast(self.matrix.device.type, enabled=False), full_float32():
                return self.get_buffer("frozen") @ self.matrix.mT
        return F.normalize(self.codes, dim=1) if self.rule == "cosine" else self.codes

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The codes of the encoder's vectors `(B, D, h, w)`; `noise` plays no part."""
        table, batch = self.table(), len(output)
        as_given = _rows(output)
        tokens = nearest(as_given, table.detach())
        vectors = F.normalize(as_given, dim=1) if self.rule == "cosine" else as_given
        chosen = table[tokens]
        if torch.is_grad_enabled():
            self._note(tokens)
            if self._moves_codes:
                self._seen.append(vectors.detach())
        passed = (rotate if self.gradient == "rotation" else straight_through)(vectors, chosen)
        penalties = {
            "codebook": _per_sample((vectors.detach() - chosen).square(), batch),
            "commitment": _per_sample((as_given - chosen.detach()).square(), batch),
        }
        return Code(_places(passed, output), penalties, self._facts())

    @property
    def _moves_codes(self) -> bool:
        """Whether dead codes are restarted: not for ever, where the decoder learns alone."""
        return self.restart_after > 0 and self.codes.requires_grad

    def _adapt(
        self, step: int, counts: Tensor, seen: Sequence[Tensor], processes: Processes, seed: int
    ) -> Mapping[str, Tensor]:
        """Move codes that were not used for long to vectors drawn from the global batch.

        Which vectors is a function of seed and step, by their place in the batch in the order of
        its samples, so it does not depend on processes and micro-batches. In the first step of a
        new codebook every code that nothing used is moved. The host never waits for the device to
        learn how many there are.
        """
        if not seen:
            return {}
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        at_start = step == 0 and self.is_new
        count = len(self.idle) if at_start else min(_RESTARTS_AT_ONCE, len(self.idle))
        # Stable, so that every process and device picks the same ones of equal age.
        longest = self.idle.argsort(descending=True, stable=True)[:count]
        dead = self.idle[longest] >= (1 if at_start else self.restart_after)
        vectors = self._drawn(torch.cat(list(seen)), count, processes, seed, step)
        self.codes[longest] = torch.where(dead[:, None], vectors, self.codes[longest])
        self.idle[longest] = torch.where(dead, 0, self.idle[longest])
        mask = torch.zeros(len(self.idle), dtype=torch.bool, device=self.idle.device)
        mask[longest] = dead
        return {"codes": mask}

    def _drawn(
        self, here: Tensor, count: int, processes: Processes, seed: int, step: int
    ) -> Tensor:
        """`(count, D)` vectors of the global batch; every process has a stretch of it."""
        draw, everywhere = generator(seed, Purpose.RESTART, step), len(here) * processes.world
        chosen = draw.integers(everywhere, size=count)
        local = to_device(torch.from_numpy(chosen - processes.rank * len(here)), here.device)
        inside = (local >= 0) & (local < len(here))
        vectors = here[local.clamp(0, len(here) - 1)]
        return processes.sum(torch.where(inside[:, None], vectors, 0))


class FiniteGrid(Discrete):
    """A grid of fixed points (FSQ): nothing to learn, nothing to restart.

    Vectors are clamped to [-1, 1] and rounded, axis by axis; the gradient passes both as if they
    were not there. Two penalties keep vectors where the grid is and spread them over it:

    - `range` is the mean square of what lies beyond the bounds.
    - `entropy` is how far the codes are from being equally frequent: 1 - H / log K, H the entropy
      of their frequencies; 0 where they are, 1 where there is one code. Without it all axes first
      learn the same, brightness, and vectors lie along a curve through the grid. The frequencies
      are those of earlier steps, so that it is a sum over vectors, however a batch is split.

    Args:
        levels: Values on each axis.

    Attributes:
        recent: `(K,)` share of each code, averaged over fewer steps than `usage`.
    """

    weights: ClassVar[Mapping[str, float]] = {"range": 1.0, "entropy": 0.1}
    points: Tensor
    recent: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__(math.prod(levels))
        self.levels = tuple(levels)
        self.register_buffer("recent", torch.zeros(math.prod(levels)))
        self.register_buffer("points", grid(levels), persistent=False)

    def table(self) -> Tensor:
        """The grid's points, `(K, D)`."""
        return self.points

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The grid's points nearest to the encoder's vectors `(B, D, h, w)`."""
        vectors = _rows(output)
        rounded = round_to_grid(vectors.detach(), self.levels)
        if torch.is_grad_enabled():
            self._note(self._numbers(rounded))
        beyond = (vectors.abs() - 1).clamp_min(0).square()
        penalties = {
            "range": _per_sample(beyond, len(output)),
            "entropy": _per_sample(self._crowding(vectors), len(output)),
        }
        return Code(_places(straight_through(vectors, rounded), output), penalties, self._facts())

    def _crowding(self, vectors: Tensor) -> Tensor:
        """The penalty `entropy` of each of the vectors, `(N,)`.

        1 + log p / log K, where log p is interpolated between the 2^D points around a vector.
        -H = sum_k p_k log p_k changes by log p_k + 1 with each share p_k, so its gradient is that
        of H where a vector counts for the points around it by how near it is. Out of bounds there
        is nowhere to go.
        """
        frequency = (self.recent + _RARE / len(self.recent)).log() / math.log(len(self.recent))
        lowest = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
        corners, shares = lowest[:1], []
        for axis, count in enumerate(self.levels):
            place = (vectors[:, axis].clamp(-1, 1) + 1) / 2 * (count - 1)
            below = place.detach().long().clamp_max(count - 2)
            shares.append(place - below)
            lowest = lowest * count + below[:, None]
            corners = torch.cat([corners * count, corners * count + 1])
        values = frequency[lowest + corners.mT].to(vectors.dtype)
        for share in reversed(shares):  # the axis put in last is what the two halves differ in
            low, high = values.chunk(2, dim=1)
            values = low + share[:, None] * (high - low)
        return 1 + values[:, 0]

    def _adapt(
        self, step: int, counts: Tensor, seen: Sequence[Tensor], processes: Processes, seed: int
    ) -> Mapping[str, Tensor]:
        """Take in how frequent codes are by now."""
        shares = counts / counts.sum().clamp_min(1)
        self.recent.lerp_(shares, 1.0 if step == 0 else 1 - _RECENT_DECAY)
        return {}

    def _numbers(self, points: Tensor) -> Tensor:
        """Numbers of points of the grid, by axis: no search."""
        numbers = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for axis, count in enumerate(self.levels):
            place = ((points[:, axis] + 1) / 2 * (count - 1)).round().long()
            numbers = numbers * count + place
        return numbers


def _rows(latents: Tensor) -> Tensor:
    return rearrange(latents, "b d h w -> (b h w) d").contiguous()


def _places(rows: Tensor, like: Tensor) -> Tensor:
    b, _, h, w = like.shape
    return rearrange(rows, "(b h w) d -> b d h w", b=b, h=h, w=w)


def _per_sample(values: Tensor, batch: int) -> Tensor:
    return values.view(batch, -1).mean(1)
