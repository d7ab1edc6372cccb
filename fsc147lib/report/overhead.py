"""The cost of the attention loss: the time of a training step with and without it.

Variants take turns, and a turn's times are divided by one another, because a machine's speed drifts.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..data import Sample, open_split
from ..evaluation.metrics import bootstrap_interval
from ..model.answers import count_loss
from ..model.collate import Batch, Collate, to_device
from ..model.device import choose_compute
from ..model.heatmaps import METHODS, make_heatmap, method_names
from ..model.network import CountingModel, compile_layers, freeze_vision
from ..options import Precision, need, need_report
from ..training.losses import DualLoss, LossParts
from ..training.memory import peak_memory
from ..training.setup import TrainConfig
from ..training.step import TrainingStep, make_accelerator, make_optimizer
from .shapes import drawn_root, load_or_shape
from .timing import seconds_of, table, write_report


@dataclass(frozen=True)
class OverheadConfig:
    """Time a training step with the count loss alone, and with each heatmap: only computed, and trained."""

    model: str = "tiny"
    """"tiny", a folder, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes, nothing to download."""
    methods: tuple[str, ...] = method_names(trainable=True)
    """Heatmaps to time."""
    image_size: tuple[int, int] = (384, 576)
    """Height and width of the drawn pictures."""
    batch_size: int = 8
    """Images of a step."""
    batches: int = 4
    """Different batches, used in turn."""
    rounds: int = 20
    """Timed steps of each variant."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU (fp16 on one that has no bf16), fp32 elsewhere."""
    compile: bool = False
    """Compile the layers; passes of a gradient heatmap stay plain."""
    json: Path | None = None
    """Write the rows here, and to the same name with .csv."""

    def __post_init__(self):
        for name in ("batch_size", "batches", "rounds"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "image_size", min(self.image_size) >= 32, "at least 32 pixels each")
        need_report(self, "rows")


def variants_of(methods: tuple[str, ...], batch_size: int) -> list[dict]:
    """The variants to time, a dict each: the count loss alone, and each method's heatmap, computed and trained.

    A method whose default number of images is smaller than the batch has a third variant, trained on that many.  Keys:
    `images`, number of images whose heatmap is trained (None: all); `every`, the method's default K, by which the
    overhead is divided later: each timed step looks.
    """
    variants = [{"name": "count only", "method": "none", "trained": False, "images": None, "every": 1}]
    for name in methods:
        method = METHODS[name]
        row = {"method": name, "trained": False, "images": None, "every": method.every}
        variants.append({"name": f"{name}, computed", **row})
        variants.append({"name": f"{name}, trained", **row, "trained": True})
        if method.images and method.images < batch_size:
            few = {"trained": True, "images": method.images}
            variants.append({"name": f"{name}, trained on {method.images}", **row, **few})
    return variants


class HeatmapBesideCount(DualLoss):
    """The count loss alone, although the heatmap is computed."""

    def forward(self, batch: Batch, weight, tokens=None, images=None) -> LossParts:
        logits, _ = self.heatmap.with_logits(batch)
        count = count_loss(logits, batch["answer_labels"]) / tokens
        return LossParts(count, count, torch.zeros_like(count))


def take_turns(steps: dict[str, Callable], batches: list[Batch], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Time steps in turn, A B C A B C ..., after two rounds without timing; returns name -> seconds [rounds]."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(partial(step, [batches[turn % len(batches)]]), device))
    return {name: np.array(found[2:]) for name, found in seconds.items()}


def time_losses(model: CountingModel, samples: list[Sample], config: OverheadConfig) -> list[dict]:
    """Time a training step of each of `variants_of`.

    Args:
        model: its weights change a little (learning rate 1e-6).
        samples: one batch or more; a ValueError if they are fewer.

    Returns:
        The variants, each with `out_of_memory`; if that is false also with `peak_memory` (MiB), `seconds_` and
        `overhead_low`, `_median` and `_high`.  Seconds are quartiles; overhead is the extra time relative to "count
        only" (0.03 is 3 %), with its 95 % bootstrap interval.  Trained ones have `overhead_lazy`: the median over K.
    """
    size = config.batch_size
    if len(samples) < size:
        raise ValueError(f"{len(samples)} samples make no batch of {size}: give more, or a smaller batch size")
    compute = choose_compute(config.precision)
    device, accelerator = compute.device.type, make_accelerator(compute)
    network = model.network.to(device).train()
    freeze_vision(network, not model.recipe.train_vision)
    optimizer = make_optimizer(network, 1e-6)  # one for all variants: less memory
    collate = Collate(model.tokenizer, model.image_processor)
    starts = range(0, len(samples) - size + 1, size)
    batches = [to_device(collate(samples[start : start + size]), device) for start in starts]
    if config.compile:
        compile_layers(network, make_heatmap(network).layers)
    rows, steps = variants_of(config.methods, size), {}
    for row in rows:
        counts_alone = row["method"] == "none"
        heatmap = make_heatmap(network, "attention" if counts_alone else row["method"])
        loss_class = DualLoss if row["trained"] or counts_alone else HeatmapBesideCount
        loss = loss_class(network, heatmap=heatmap, heatmap_images=row["images"])
        weight = TrainConfig.attention_weight if row["trained"] else 0
        step = partial(TrainingStep(loss, optimizer, accelerator, compute), weight=weight)
        try:
            step([batches[0]])  # the first step allocates what stays
            row["peak_memory"] = peak_memory(partial(step, [batches[0]]), device)
            steps[row["name"]] = step
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
        row["out_of_memory"] = row["name"] not in steps
    seconds = take_turns(steps, batches, config.rounds, device)
    ends = ("low", "median", "high")
    for row in rows:
        if row["out_of_memory"]:
            continue
        own = seconds[row["name"]]
        quartiles = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        interval = bootstrap_interval(own / seconds["count only"] - 1, np.median)
        row |= {f"seconds_{end}": number for end, number in zip(ends, quartiles, strict=True)}
        row |= {f"overhead_{end}": number for end, number in zip(ends, interval, strict=True)}
        if row["trained"]:
            row["overhead_lazy"] = row["overhead_median"] / row["every"]
    return rows


def measure_overhead(config: OverheadConfig) -> list[dict]:
    """The rows of `time_losses` on drawn pictures, printed and written; `fsc147lib overhead` calls this."""
    model = load_or_shape(config.model, choose_compute(config.precision).device.type)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [config.image_size] * (config.batches * config.batch_size)
        rows = time_losses(model, open_split(drawn_root(Path(folder) / "root", sizes), "train"), config)
    if config.json is not None:
        write_report(config.json, {"rows": rows}, config)
    print(table(rows))
    return rows
