"""Which kernels a compiled step runs, and what the attention loss adds: python step_profile.py MODEL BATCH TURNS JSON.

The model's encoder is frozen; images are 384 x 576.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fsc147lib.data import open_split
from fsc147lib.model.collate import Collate, to_device
from fsc147lib.model.device import choose_compute
from fsc147lib.model.network import compile_layers, freeze_vision
from fsc147lib.report.shapes import drawn_root, load_or_shape
from fsc147lib.report.timing import seconds_of
from fsc147lib.training.losses import DualLoss
from fsc147lib.training.step import TrainingStep, make_accelerator, make_optimizer

name, size, turns, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
compute = choose_compute()
model = load_or_shape(name, "cuda")
freeze_vision(model.network.train(), True)
with tempfile.TemporaryDirectory() as folder:
    samples = open_split(drawn_root(Path(folder) / "root", [(384, 576)] * size), "train")
    batch = to_device(Collate(model.tokenizer, model.image_processor)(list(samples)), "cuda")
loss = DualLoss(model.network)
compile_layers(model.network, loss.heatmap.layers)
step = TrainingStep(loss, make_optimizer(model.network, 1e-6), make_accelerator(compute), compute)
seconds, kernels = {"count only": [], "both losses": []}, {}
for turn in range(turns + 2):
    for weight, times in enumerate(seconds.values()):
        times += [seconds_of(lambda weight=weight: step([batch], weight), "cuda")] * (turn > 1)
for weight, what in enumerate(seconds):
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step([batch], weight)
        torch.cuda.synchronize()
    kernels[what] = Counter()
    for event in found.events():
        kernels[what][event.name[:150]] += event.self_device_time_total / 1000
report = {
    "torch": torch.__version__, "gpu": torch.cuda.get_device_name(),
    "milliseconds": {what: 1000 * float(np.median(times)) for what, times in seconds.items()},
    "kernels_total": {what: sum(times.values()) for what, times in kernels.items()},
    "kernels": [{"name": kernel, "ms": ms} for kernel, ms in kernels["both losses"].most_common(70)],
}  # fmt: skip
out.write_text(json.dumps(report, indent=1))
