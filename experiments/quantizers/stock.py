"""Diffusers' own quantizer as a family of the trainer: what a `VQModel` trains with by itself.

Its loss is |z_q - sg(z)|^2 and |sg(z_q) - z|^2 with beta (0.25) on the *first* of the two, the
other way round than van den Oord et al. 2017, and nothing restarts a code that nobody uses.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from first_stage.config.schema import ModelConfig
from first_stage.config.sections import section
from first_stage.config.types import PositiveInt
from first_stage.models.bottlenecks import Bottleneck, Code
from first_stage.models.built_in import VQ
from first_stage.models.discrete import Discrete
from first_stage.models.families import register_family


@dataclass(frozen=True)
class StockConfig:
    """Diffusers' `VectorQuantizer`."""

    codes: PositiveInt = 1024
    """Number of codes (K)."""


class StockCodebook(Discrete):
    """`VQModel.quantize` as it is, codes and loss; only the usage is counted here.

    Args:
        model: The `VQModel`.
    """

    weights: ClassVar[dict[str, float]] = {"stock": 1.0}

    def __init__(self, model: Any):
        super().__init__(len(model.quantize.embedding.weight))
        self._quantize = (model.quantize,)  # a tuple: its weights are the model's, not ours too

    def table(self) -> Tensor:
        """`(K, D)`."""
        return self._quantize[0].embedding.weight

    def forward(self, output: Tensor, noise: Tensor | None = None) -> Code:
        """What the stock class makes of `(B, D, h, w)`; its loss is a mean over the batch."""
        latents, loss, (_, _, tokens) = self._quantize[0](output)
        if torch.is_grad_enabled():
            self._note(tokens.flatten())
        return Code(latents, {"stock": loss.expand(len(output))}, self._facts())


class Stock(VQ):
    """`VQModel` with the quantizer that it comes with."""

    name = "stock"
    section = StockConfig  # type: ignore[assignment]

    def build(self, config: ModelConfig, sample_size: int) -> Any:
        """As `vq`."""
        codes = section(config, self.name, StockConfig).codes
        return self._model(config, sample_size, codes, config.latent_channels)

    def bottleneck(self, model: Any, config: ModelConfig | None = None) -> Bottleneck:
        """Its own."""
        return StockCodebook(model)


register_family(Stock())
