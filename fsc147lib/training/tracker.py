"""Weights & Biases, offline unless one asks for more.

Left out: what is logged, and metrics.jsonl, which is there without it (`run`).
"""

import os
from pathlib import Path
from typing import Literal

from ..options import ConfigError


def start_tracker(out: Path, mode: Literal["offline", "online", "disabled"], config: dict):
    """A Weights & Biases run with `log` and `finish`, its files in `out`/wandb; None where the mode is "disabled"."""
    if mode == "disabled":
        return None
    import wandb  # takes half a second
    from wandb.errors import Error

    os.environ.setdefault("WANDB_SILENT", "true")  # it would print into every notebook
    try:
        return wandb.init(project="fsc147lib", name=out.name, dir=out, mode=mode, config=config)
    except Error as error:
        raise ConfigError(
            f"tracking (--tracking) is {mode}, but Weights & Biases says: {error}  Log in with `wandb login`, or "
            "train with --tracking offline"
        ) from error
