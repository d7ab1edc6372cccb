"""How well a model counts and looks: metrics of counts and maps, answering a split, faithfulness of maps.

The results are numbers and text tables; `report` draws them.
"""

from .answering import EvaluateConfig, Evaluation, ImageResult, Reading, evaluate, evaluate_samples
from .faithfulness import Faithfulness, faithfulness_table, measure_maps, own_against_true, own_against_true_table
from .metrics import (
    absolute_errors,
    alignment,
    answer_histogram,
    bootstrap_interval,
    calibration,
    constant_baselines,
    counting_metrics,
    paired_difference,
)
from .tables import metrics_table

__all__ = [
    "EvaluateConfig", "Evaluation", "Faithfulness", "ImageResult", "Reading", "absolute_errors", "alignment",
    "answer_histogram", "bootstrap_interval", "calibration", "constant_baselines", "counting_metrics", "evaluate",
    "evaluate_samples", "faithfulness_table", "measure_maps", "metrics_table", "own_against_true",
    "own_against_true_table", "paired_difference",
]  # fmt: skip
