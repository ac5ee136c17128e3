"""Measure first stages: any diffusers autoencoder, on one process or several.

`evaluate` runs everything and returns an `Evaluation`, `evaluate_change` also of what a first stage
gained over the one it came from; `save` writes it as files that the report
is made from.
"""

from first_stage.evaluation.evaluate import evaluate, evaluate_change
from first_stage.evaluation.files import Evaluation, is_evaluation, load, save
from first_stage.evaluation.images import EvaluationImages, HeldImages, ImageList
from first_stage.evaluation.measure import Options
from first_stage.evaluation.pictures import Pair
from first_stage.evaluation.table import comparison_table

__all__ = [
    "Evaluation",
    "EvaluationImages",
    "HeldImages",
    "ImageList",
    "Options",
    "Pair",
    "comparison_table",
    "evaluate",
    "evaluate_change",
    "is_evaluation",
    "load",
    "save",
]
