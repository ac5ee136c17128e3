"""Train the first stage of a latent diffusion model on your own images.

The names below are found when they are first used, so that `import first_stage` and
`first-stage --help` load nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from first_stage.config import Config as Config
    from first_stage.config import parse_config as parse_config
    from first_stage.data import open_source as open_source
    from first_stage.errors import ConfigError as ConfigError
    from first_stage.errors import DataError as DataError
    from first_stage.errors import UserError as UserError
    from first_stage.evaluation import EvaluationImages as EvaluationImages
    from first_stage.evaluation import comparison_table as comparison_table
    from first_stage.evaluation import evaluate as evaluate
    from first_stage.evaluation import evaluate_change as evaluate_change
    from first_stage.evaluation import save as save
    from first_stage.models.loading import load_autoencoder as load_autoencoder
    from first_stage.report import write_report as write_report
    from first_stage.training.endings import Outcome as Outcome
    from first_stage.training.loop import train as train

__version__ = "0.1.0"

_HOMES = {
    "Config": "first_stage.config",
    "parse_config": "first_stage.config",
    "open_source": "first_stage.data",
    "ConfigError": "first_stage.errors",
    "DataError": "first_stage.errors",
    "UserError": "first_stage.errors",
    "EvaluationImages": "first_stage.evaluation",
    "comparison_table": "first_stage.evaluation",
    "evaluate": "first_stage.evaluation",
    "evaluate_change": "first_stage.evaluation",
    "save": "first_stage.evaluation",
    "load_autoencoder": "first_stage.models.loading",
    "write_report": "first_stage.report",
    "Outcome": "first_stage.training.endings",
    "train": "first_stage.training.loop",
}
"""Public name to the module that defines it."""

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "EvaluationImages",
    "Outcome",
    "UserError",
    "comparison_table",
    "evaluate",
    "evaluate_change",
    "load_autoencoder",
    "open_source",
    "parse_config",
    "save",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
