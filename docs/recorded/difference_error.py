"""How far `--gradient-method difference` is from the exact derivative in float32: python difference_error.py MODEL."""

import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

from fsc147lib.data import open_split
from fsc147lib.model import gradient_difference
from fsc147lib.model.collate import Collate, to_device
from fsc147lib.model.heatmaps import Heatmap
from fsc147lib.model.network import freeze_vision
from fsc147lib.report.shapes import drawn_root, load_or_shape
from fsc147lib.training.losses import DualLoss

DEVICE, SIZE = ("cuda", (384, 576)) if torch.cuda.is_available() else ("cpu", (160, 224))
torch.manual_seed(0)
model = load_or_shape(sys.argv[1], DEVICE)
network = model.network.to(DEVICE).train()
freeze_vision(network, True)
with tempfile.TemporaryDirectory() as folder:
    samples = open_split(drawn_root(Path(folder) / "root", [SIZE] * 2), "train")
    batch = to_device(Collate(model.tokenizer, model.image_processor)(samples), DEVICE)


def gradient(method: str, bf16: bool, compiled: bool = False) -> list[torch.Tensor]:
    """Of the attention loss alone, by all weights that train: the count loss would hide the error."""
    network.zero_grad()
    heatmap = Heatmap(network, "token_gradient", gradient_method=method, compiled=compiled)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        loss = DualLoss(network, heatmap=heatmap)(batch).attention
    loss.backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters() if p.requires_grad]


def compare(found: list[torch.Tensor], exact: list[torch.Tensor]) -> str:
    def product_of(a, b) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    error = product_of(*[[x - y for x, y in zip(found, exact, strict=True)]] * 2)
    squares = product_of(exact, exact)
    cosine = product_of(found, exact) / (product_of(found, found) * squares) ** 0.5
    return f"error {(error / squares) ** 0.5:.3f}, cosine {cosine:.3f}"


right = gradient("exact", False)
print("exact in bfloat16:", compare(gradient("exact", True), right))
for compiled, bf16, step in product((False, True), (False, True), (0.1, 0.03, 0.01)):
    gradient_difference.STEP = step
    how = f"step {step}, {'bfloat16' if bf16 else 'float32'}{', compiled' * compiled}"
    print(f"difference, {how}:", compare(gradient("difference", bf16, compiled), right), flush=True)
