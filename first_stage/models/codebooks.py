"""Learned codebooks: free codes, directions, and frozen codes through one learned matrix."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.distributed.processes import Processes
from first_stage.metrics.precision import full_float32
from first_stage.models.bottlenecks import Code
from first_stage.models.discrete import Discrete, per_sample, to_places, to_rows
from first_stage.models.quantizers import nearest, rotate, straight_through
from first_stage.models.spread import crowding
from first_stage.seeding import Purpose, generator, to_device

Rule = Literal["euclidean", "cosine", "linear"]
FreeRule = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation"]

_RESTARTS_AT_ONCE = 64


@dataclass(frozen=True)
class CodebookConfig:
    """A learned codebook (van den Oord et al. 2017)."""

    codes: PositiveInt = 1024
    """Number of codes (K)."""
    rule: Rule | None = None
    """euclidean: the nearest of K free vectors; cosine: of K directions, whatever a vector's length
    (ViT-VQGAN); linear: of K frozen random vectors through one learned matrix (SimVQ, Zhu et al.
    2024), whose vectors are spread over all directions; null: linear above 1024 codes, euclidean
    up to there."""
    gradient: Gradient = "straight_through"
    """How the decoder's gradient passes a code: copied, or turned as the vector was (rotation
    trick, Fifty et al. 2024)."""
    restart_after: NonNegativeInt = 200
    """Steps without use after which a free code is moved to a vector of the batch; 0: never."""


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
        restart_after: As in `CodebookConfig`.
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
        rule: FreeRule = "euclidean",
        gradient: Gradient = "straight_through",
        restart_after: int = 0,
        table: Tensor | None = None,
    ):
        super().__init__(codes)
        self.rule, self.gradient, self.is_new = rule, gradient, table is None
        self.restart_after = restart_after
        if table is None:
            table = torch.randn(codes, dimensions) / math.sqrt(dimensions)
        self._hold(table.clone())
        if self.restart_after:
            self.register_buffer("idle", torch.zeros(codes))
        self.to(table.device)

    def _hold(self, table: Tensor) -> None:
        """Make what is learned of the codes to start from, `(K, D)`."""
        self.codes = nn.Parameter(table)

    def table(self) -> Tensor:
        """`(K, D)`: the codes; of unit length for cosine."""
        return F.normalize(self.codes, dim=1) if self.rule == "cosine" else self.codes

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """The codes of the encoder's vectors `(B, D, h, w)`; `noise` plays no part."""
        table, batch = self.table(), len(output)
        as_given = to_rows(output)
        tokens = nearest(as_given, table.detach())
        vectors = F.normalize(as_given, dim=1) if self.rule == "cosine" else as_given
        chosen = table[tokens]
        if torch.is_grad_enabled():
            self._note(tokens)
            if self._moves_codes:
                self._seen.append(vectors.detach())
        passed = (rotate if self.gradient == "rotation" else straight_through)(vectors, chosen)
        penalties = {
            "codebook": per_sample((vectors.detach() - chosen).square(), batch),
            "commitment": per_sample((as_given - chosen.detach()).square(), batch),
        }
        return Code(to_places(passed, output), penalties, self._facts())

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


class LinearCodebook(Codebook):
    """Frozen random codes through one learned matrix (SimVQ, Zhu et al. 2024).

    Every code moves in each step, so none has to be restarted. But codes go where vectors are: when
    these first all say the same, brightness, the matrix loses the other directions, and most codes
    lie beside the curve along which the vectors lie. `spread` (see `crowding`), which is not the
    paper's, asks vectors to vary in all directions.

    Args:
        codes: Number of codes (K).
        dimensions: Of a code (D).
        gradient: As in `CodebookConfig`.
        table: Codes to start from, `(K, D)`; drawn at random when `None`.

    Attributes:
        frozen: `(K, D)`, what the matrix makes codes of.
    """

    weights: ClassVar[Mapping[str, float]] = {**Codebook.weights, "spread": 0.003}
    frozen: Tensor

    def __init__(
        self,
        codes: int,
        dimensions: int,
        gradient: Gradient = "straight_through",
        table: Tensor | None = None,
    ):
        super().__init__(codes, dimensions, gradient=gradient, table=table)

    def _hold(self, table: Tensor) -> None:
        self.register_buffer("frozen", table)
        self.matrix = nn.Parameter(torch.eye(table.shape[1]))

    def table(self) -> Tensor:
        """`(K, D)`: the frozen codes through the matrix."""
        # In float32 whatever autocast computes in: the exported codes are these.
        with torch.autocast(self.matrix.device.type, enabled=False), full_float32():
            return self.frozen @ self.matrix.mT

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """As `Codebook`, with the penalty `spread`."""
        code = super().forward(output, noise)
        return code._replace(penalties={**code.penalties, "spread": crowding(output)})
