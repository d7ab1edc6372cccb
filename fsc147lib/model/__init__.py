"""`Sample` to answer, and what was looked at: Qwen3-VL with its prompt and pixels, the direct forward pass, greedy
answers, and heatmaps (several methods, one signature).

Left out: whether answer and heatmap are right (`evaluation`), and how they become so (`training`).
"""

from .collate import Batch, Collate
from .heatmaps import METHODS, Heatmap, corner_share, default_layers, look, mean_map
from .load import load_model
from .network import CountingModel, ModelError

__all__ = [
    "METHODS", "Batch", "Collate", "CountingModel", "Heatmap", "ModelError", "corner_share", "default_layers",
    "load_model", "look", "mean_map",
]  # fmt: skip
