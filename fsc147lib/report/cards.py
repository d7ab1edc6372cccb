"""What fits on a card of 16, 24, 40 or 80 GB: the rows of docs/cards.md, measured on one card of 80 GB.

Run it as `python -m fsc147lib.report.cards OUT.json`.  PyTorch's allocator is limited to what such a card leaves a
process, the model has random weights at its true shape, and the pictures are as wide as FSC147's widest.

Left out: how a plan is measured (`training.plan`).
"""

import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ..training import loop, plan
from .shapes import drawn_root, load_or_shape
from .timing import write_report

CARDS = {"16 GB": 14.0, "24 GB": 21.5, "40 GB": 38.5, "80 GB": 78.0}
"""GiB that are left beside the driver's own (a T4 has 14.6, an L4 22.0, an A100 39.4 or 79.1)."""

WIDEST = np.interp(range(64), [0, 4, 10, 16, 24, 32, 48, 63], [1584, 1326, 1104, 1008, 910, 829, 768, 739])
"""Widths in pixels, at 384 of height, of FSC147's widest 64 pictures."""


def measure_cards(path: Path, model: str = "qwen3-vl-2b", compiled: bool = False) -> list[dict]:
    """Measure all rows; print and write each as it is known."""
    total, rows = torch.cuda.mem_get_info()[1], []
    loop.load_model = lambda name, **_: load_or_shape(name, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        root = drawn_root(Path(folder) / "root", [(384, round(width)) for width in WIDEST])
        wanted = partial(
            loop.TrainConfig, root, Path(folder) / "run", model, epochs=2, batch_size=64, vision_cache="host",
            compile=compiled, workers=0,
        )  # fmt: skip
        for (card, room), lora, checkpointing in product(CARDS.items(), (None, 16), (False, True)):
            torch.cuda.set_per_process_memory_fraction(min(1.0, room * 2**30 / total))
            precision = "fp16" if card == "16 GB" else "bf16"  # a T4 has no bfloat16
            options = {"lora": lora, "gradient_checkpointing": checkpointing, "precision": precision}
            found = plan.largest_that_fits(wanted(**options))
            size = found.config.batch_size
            rows.append({
                "name": card, "room": room, **options, "compiled": compiled, "fits": found.fits,
                "batch_size": size, "gib": found.total / 2**30,
                "images_per_second": size * found.config.accumulation / found.step if found.fits else None,
            })  # fmt: skip
            print(rows[-1], flush=True)
            write_report(path, {"model": model, "rows": rows})
    return rows


if __name__ == "__main__":
    measure_cards(Path(sys.argv[1]), compiled="--compile" in sys.argv)
