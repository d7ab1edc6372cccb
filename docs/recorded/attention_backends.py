"""Flash against cuDNN attention, at one length and where each call has a new one: python attention_backends.py JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fsc147lib.report.timing import seconds_of

SHAPES = {  # images, heads, key heads, length, width of a head, causal, trained
    "text, forward and back": (64, 16, 8, 230, 128, True, True),
    "vision, forward": (64, 16, 16, 768, 64, False, False),
}


def attention(images, heads, key_heads, length, width, causal, trained):
    shapes = [(images, number, length, width) for number in (heads, key_heads, key_heads)]
    states = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=trained) for s in shapes]

    def run() -> None:
        output = F.scaled_dot_product_attention(*states, is_causal=causal, enable_gqa=heads != key_heads)
        if trained:
            output.backward(torch.ones_like(output))

    return run


def milliseconds(calls) -> float:
    return 1000 * seconds_of(lambda: [call() for call in calls], "cuda") / len(calls)


rows = []
for what, shape in SHAPES.items():
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            steady = [attention(*shape)] * 50
            milliseconds(steady)
            new = [attention(*shape[:3], shape[3] + 1 + i, *shape[4:]) for i in range(12)]
            row = {"ms": milliseconds(steady), "ms at a new length": milliseconds(new)}
        rows.append({"what": what, "backend": name, **row, "ms at that length again": milliseconds(new)})
        print(rows[-1], flush=True)
report = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows}
Path(sys.argv[1]).write_text(json.dumps(report, indent=1))
