"""`Sample` to answer, and where the model looked: Qwen3-VL with its prompt and pixels, the direct forward pass and its
trace, greedy answers, and heatmaps (several methods, one signature).

Left out: whether answer and heatmap are right (`evaluation`), and how they become so (`training`).
"""

from .answers import count_loss
from .collate import Batch, Collate, select_rows, to_device
from .device import default_workers, make_accelerator
from .forward import Trace, answer_logits
from .heatmaps import METHODS, Heatmap, default_layers, method_names, register, visual_mass
from .load import load_model
from .looking import Look, corner_share, look, mean_map
from .network import CountingModel, ModelError
from .occlusion import Occlusion, occlude
from .pixels import PixelStore
from .prediction import Prediction, count_without, predict, predict_samples
from .vision_cache import VisionCache

__all__ = [
    "METHODS", "Batch", "Collate", "CountingModel", "Heatmap", "Look", "ModelError", "Occlusion", "PixelStore",
    "Prediction", "Trace", "VisionCache", "answer_logits", "corner_share", "count_loss", "count_without",
    "default_layers", "default_workers", "load_model", "look", "make_accelerator", "mean_map", "method_names",
    "occlude", "predict", "predict_samples", "register", "select_rows", "to_device", "visual_mass",
]  # fmt: skip
