"""Clipping and AdamW of 1.7 billion weights, one after the other and in one pass: python clip_and_step.py JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from fsc147lib.report.timing import seconds_of

LAYER = [(2048, 2048), (1024, 2048), (1024, 2048), (2048, 2048), (6144, 2048), (6144, 2048), (2048, 6144), (2048,)]
weights = [torch.nn.Parameter(torch.randn(s, device="cuda") * 0.02) for s in [(151936, 2048), *LAYER * 28]]
optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)


def norm_alone():
    return torch.nn.utils.get_total_norm([weight.grad for weight in weights])


def adamw_alone():
    optimizer.grad_scale = None
    optimizer.step()


def clip_then_adamw():
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    adamw_alone()


def adamw_that_clips():
    optimizer.grad_scale = norm_alone().clamp(min=1)
    optimizer.step()


ms = {run: [] for run in (clip_then_adamw, adamw_that_clips, norm_alone, adamw_alone)}
for _ in range(8):
    for run, times in ms.items():
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        times.append(1000 * seconds_of(run, "cuda"))
rows = [{"what": run.__name__, "ms": float(np.median(times[2:]))} for run, times in ms.items()]
report = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows}
Path(sys.argv[1]).write_text(json.dumps(report, indent=1))
