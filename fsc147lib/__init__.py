"""Teach Qwen3-VL to count on FSC147, and see where it looks while it counts.

Five rooms in one line, each using only those before it: `data` (a root on disk to samples), `model` (a sample
to an answer and where it was looked at), `evaluation` (how well it counts and looks), `training` (losses, step,
run), `report` (what a person looks at).  `files` and `options` lie below them, the command line above.
"""

import importlib
import os

# Before torch is loaded: threads that spin while they wait bring two processes on few cores to a standstill.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before the GPU is used: batches differ in length, and pieces of fixed size would leave gaps that fit none of them.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

_ROOM_OF = {
    "FSC147": "data", "check": "data", "make_dataset": "data",
    "load_model": "model", "predict": "model", "Heatmap": "model", "look": "model", "register": "model",
    "evaluate_samples": "evaluation",
    "TrainConfig": "training", "train": "training",
}  # fmt: skip
__all__ = list(_ROOM_OF)


def __getattr__(name: str):
    """The public names, loaded when first asked for: importing torch and transformers takes seconds."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fsc147lib' has no name {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
