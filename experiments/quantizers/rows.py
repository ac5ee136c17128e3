"""The first stages that are compared, and the budgets that all of them get."""

from dataclasses import replace
from typing import Any

from experiments.objectives.rows import BUDGETS as OBJECTIVES
from experiments.objectives.rows import Budget, Size
from experiments.quantizers.stock import StockConfig
from first_stage.config.schema import Config, ModelConfig
from first_stage.config.sections import with_sections
from first_stage.models.codebooks import CodebookConfig
from first_stage.models.grids import GridConfig

DIMENSIONS = 4
"""Latent channels of all but the largest grid, which has an axis more."""
BASELINE, OBJECTIVE = "mse", "learned+hinge"
"""What all first stages train with, and what two of them do with a critic besides."""
WITH_CRITIC = ("vq-1024", "fsq-1024")

BUDGETS: dict[Size, Budget] = OBJECTIVES | {
    "quick": replace(
        OBJECTIVES["quick"],
        steps=800,
        widths=(16, 32, 32),
        critic_width=16,
        learning_rate=3e-3,
        critic_learning_rate=1e-3,
    )
}
"""As for the objectives, but the short one: half the widths, for there are more rows here, and a
learning rate at which 1,200 steps come to colors."""


def _first_stage(family: str, dimensions: int = DIMENSIONS, **section: Any) -> ModelConfig:
    kind = type(with_sections(Config)().model)  # has the families' own sections
    return kind(family=family, latent_channels=dimensions, **section)


FIRST_STAGES: dict[str, ModelConfig] = {
    "kl": _first_stage("kl"),
    "stock-1024": _first_stage("stock", stock=StockConfig(1024)),
    "vq-1024": _first_stage("vq", vq=CodebookConfig(1024, "euclidean")),
    "simvq-1024": _first_stage("vq", vq=CodebookConfig(1024, "linear")),
    "fsq-1024": _first_stage("fsq", fsq=GridConfig((8, 5, 5, 5))),
    "stock-16384": _first_stage("stock", stock=StockConfig(16384)),
    "vq-16384": _first_stage("vq", vq=CodebookConfig(16384, "euclidean")),
    "simvq-16384": _first_stage("vq", vq=CodebookConfig(16384, "linear")),
    "fsq-16384": _first_stage("fsq", 5, fsq=GridConfig((8, 8, 8, 6, 5))),
}
"""By name: family and rough number of codes (the grids have 1,000 and 15,360)."""

WANTED: dict[str, float] = {
    "vq-1024": 0.95,
    "simvq-1024": 0.95,
    "fsq-1024": 0.95,
    "simvq-16384": 0.80,
    "fsq-16384": 0.80,
}
"""What share of its codes each should use on held-out photos at least."""
