"""The configuration of a run: its sections, their types and checks, and how it is read."""

from first_stage.config.checks import check
from first_stage.config.parsing import parse_config, to_dict
from first_stage.config.schema import (
    AdversarialConfig,
    BalanceConfig,
    Config,
    CriticConfig,
    DataConfig,
    DisturbConfig,
    ExportConfig,
    LearnedConfig,
    LossConfig,
    ModelConfig,
    PretrainedConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "AdversarialConfig",
    "BalanceConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DisturbConfig",
    "ExportConfig",
    "LearnedConfig",
    "LossConfig",
    "ModelConfig",
    "PretrainedConfig",
    "TrainConfig",
    "ValidationConfig",
    "check",
    "parse_config",
    "to_dict",
]
