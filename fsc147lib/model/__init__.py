"""The model: Qwen3-VL with its prompt and pixels, the forward pass, answers and their probabilities, and several
methods that map where it looks.
"""

from .answers import count_loss
from .collate import Batch, Collate, PixelStore, select_rows, to_device
from .device import Compute, choose_compute, default_workers
from .features import KeptFeatures
from .forward import answer_logits, read_prompts
from .heatmaps import METHODS, Attention, Heatmap, default_layers, digits_mass, make_heatmap, method_names, register
from .load import load_model
from .looking import Look, Prediction, corner_share, count_without, look, mean_map, predict, predict_samples
from .network import CountingModel, ModelError
from .occlusion import Occlusion, occlude

__all__ = [
    "Attention", "Batch", "Collate", "Compute", "CountingModel", "Heatmap", "Look", "METHODS", "ModelError",
    "Occlusion", "PixelStore", "Prediction", "KeptFeatures", "answer_logits", "choose_compute", "corner_share",
    "count_loss", "count_without", "default_layers", "default_workers", "digits_mass", "load_model", "look",
    "make_heatmap", "mean_map", "method_names", "occlude", "predict", "predict_samples", "read_prompts", "register",
    "select_rows", "to_device",
]  # fmt: skip
