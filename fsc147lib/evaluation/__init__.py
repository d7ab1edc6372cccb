"""How well a model counts and looks: errors of counts, alignment of maps, and answering a whole split.

Left out: drawing the numbers (`report`).
"""

from .answering import EvaluateConfig, Evaluation, ImageResult, evaluate, evaluate_samples
from .metrics import alignment, constant_baselines, counting_metrics

__all__ = [
    "EvaluateConfig", "Evaluation", "ImageResult", "alignment", "constant_baselines", "counting_metrics", "evaluate",
    "evaluate_samples",
]  # fmt: skip
