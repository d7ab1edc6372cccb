"""What the attention loss costs: the same training step with and without it, timed side by side.

The large models can be timed at their true shapes with random weights, on drawn pictures: nothing is downloaded.

Left out: images a second on a data set (`throughput`), the clock and the table (`timing`).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ..data import Sample
from ..data.scenes import draw_scene
from ..evaluation.metrics import bootstrap_interval
from ..model.answers import count_loss
from ..model.collate import Batch, Collate, to_device
from ..model.device import make_accelerator, peak_memory, seconds_of
from ..model.heatmaps import METHODS, Heatmap, method_names
from ..model.load import load_model
from ..model.network import CountingModel, freeze_vision, save_memory
from ..options import Precision, need, need_report
from ..training.losses import DualLoss, LossParts
from ..training.step import TrainingStep, make_optimizer
from .timing import table, take_turns, write_report

WEIGHT = 0.1  # of the attention loss, where it is trained; its size costs nothing


@dataclass(frozen=True)
class OverheadConfig:
    """Time a training step with the count loss alone against one with each heatmap, computed only, and trained."""

    model: str = "tiny"
    """"tiny", a folder, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes, nothing to download."""
    methods: tuple[str, ...] = method_names(trainable=True)
    """Heatmaps to time."""
    heatmap_layer: int = 0
    """Of token_gradient: the layer that its tokens enter."""
    gradient_method: Literal["exact", "difference"] = "exact"
    """How token_gradient is trained, as in `train`."""
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
    """Compile the layers; a gradient heatmap that is trained leaves those plain that it differentiates twice."""
    json: Path | None = None
    """Write the rows here, and to the same name with .csv."""

    def __post_init__(self):
        for name in ("batch_size", "batches", "rounds"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "image_size", min(self.image_size) >= 32, "at least 32 pixels each")
        need_report(self, "rows")


SHAPES = {  # name: (text, vision), as in the models' own config.json
    "qwen3-vl-2b": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "qwen3-vl-4b": (
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "qwen3-vl-8b": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}


def load_or_shape(name: str, device: str = "cpu") -> CountingModel:
    """A model by its name, or one of SHAPES with random weights and the tiny model's tokenizer."""
    if name not in SHAPES:
        return load_model(name)
    text, vision = SHAPES[name]
    tiny = load_model("tiny-random")
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = tiny.network.config.to_dict()
    config["tie_word_embeddings"] = name != "qwen3-vl-8b"
    config["text_config"] |= text | {
        "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": rope,
        "initializer_range": 0.02, "tie_word_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip
    config["vision_config"] |= vision | {
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"],
        "initializer_range": 0.02,
    }  # fmt: skip
    with torch.device(device):
        network = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    tiny.image_processor.size = {"shortest_edge": 65536, "longest_edge": 16777216}  # the real one's limits
    return CountingModel(network, tiny.tokenizer, tiny.image_processor)


def drawn_samples(number: int, folder: Path, size: tuple[int, int]) -> list[Sample]:
    """Drawn samples of one size (height, width), with their pictures in a folder."""
    samples = []
    for i in range(number):
        image, scene = draw_scene(np.random.default_rng(i))
        scale = np.array([size[1] / image.width, size[0] / image.height])
        path = folder / f"{i}.jpg"
        image.resize(size[::-1]).save(path)
        points = (scene["points"] * scale).astype(np.float32)
        boxes = (scene["boxes"] * np.tile(scale, 2)).astype(np.float32)
        samples.append(Sample(path.name, scene["category"], points, boxes, path))
    return samples


@dataclass(frozen=True)
class Variant:
    """What one training step does besides the count loss: nothing (method "none"), or a heatmap of some images."""

    method: str = "none"
    trained: bool = False
    images: int | None = None  # of each batch; None for all

    @property
    def name(self) -> str:
        if self.method == "none":
            return "count only"
        some = "" if self.images is None else f" on {self.images}"
        return f"{self.method}, {'trained' if self.trained else 'computed'}{some}"


def variants_of(methods: tuple[str, ...], batch_size: int) -> list[Variant]:
    """Each method computed, trained on all images of a batch, and on its default number where that is less."""
    variants = [Variant()]
    for method in methods:
        variants += [Variant(method), Variant(method, True)]
        if (METHODS[method].images or batch_size) < batch_size:
            variants.append(Variant(method, True, METHODS[method].images))
    return variants


class HeatmapBesideCount(DualLoss):
    """The count loss alone, of a pass whose heatmap is computed and thrown away."""

    def forward(self, batch: Batch, tokens=None, images=None, weight=None) -> LossParts:
        logits, *_ = self.heatmap.with_logits(batch)
        count = count_loss(logits, batch["answer_labels"]) / tokens
        return LossParts(count, count, torch.zeros_like(count))


def step_of(variant: Variant, batches: list[Batch], heatmap: Heatmap, optimizer, accelerator) -> Callable:
    """A training step of a variant, as a function of the turn's number, on batches in turn."""
    loss = DualLoss if variant.method == "none" or variant.trained else HeatmapBesideCount
    loss = loss(heatmap.network, heatmap=heatmap, heatmap_images=variant.images)
    step = TrainingStep(loss, optimizer, accelerator)
    return lambda turn: step([batches[turn % len(batches)]], WEIGHT if variant.trained else 0)


def time_losses(
    model: CountingModel,
    samples: list[Sample],
    methods: tuple[str, ...] = method_names(trainable=True),
    batch_size: int = 8,
    rounds: int = 20,
    heatmap_layer: int = 0,
    train_vision: bool = True,
    precision: str = "auto",
    compiled: bool = False,
    gradient_method: str = "exact",
    lora: int | None = None,
    gradient_checkpointing: bool = False,
) -> list[dict]:
    """Time a step with the count loss alone against one with each heatmap, computed only, and trained.

    Args:
        model: from `load_or_shape`; its weights move by steps of 1e-6.
        samples: cut into batches; a last incomplete one is left out.
        methods: of `heatmaps.METHODS`, such as can be trained.
        rounds: timed steps of each variant.
        heatmap_layer: of token_gradient.
        train_vision: whether the vision encoder trains as well.
        precision: as in TrainConfig.
        compiled: compile the layers.
        gradient_method: of token_gradient, where it is trained.
        lora, gradient_checkpointing: as in TrainConfig.

    Returns:
        A row for each variant: `name`, `method`, `trained`, `images` (of a batch; None for all), `every` (the
        method's default K), `seconds_median`, `seconds_low` and
        `seconds_high` (quartiles), `peak_memory` (MiB); and from the ratios to "count only" within a turn
        `overhead_median`, `overhead_low` and `overhead_high` (95 % bootstrap interval), 0.03 for 3 %, and
        `overhead_lazy`, the median spread over K steps, where the heatmap is trained.
        A variant that ran out of memory has None for all of these and `out_of_memory` true.

    Raises:
        ValueError: fewer samples than one batch.
    """
    if len(samples) < batch_size:
        raise ValueError(f"{len(samples)} samples make no batch of {batch_size}: give more, or a smaller batch size")
    accelerator = make_accelerator(precision)
    device = accelerator.device.type
    save_memory(model.network, lora, gradient_checkpointing, accelerator.mixed_precision)
    network = model.network.to(device).train()
    freeze_vision(network, not train_vision)
    optimizer = make_optimizer(network, 1e-6)  # one for all: less memory
    collate = Collate(model.tokenizer, model.image_processor)
    starts = range(0, len(samples) - batch_size + 1, batch_size)
    batches = [to_device(collate(samples[start : start + batch_size]), device) for start in starts]
    variants = variants_of(methods, batch_size)
    trials, peaks = {}, {}
    for variant in variants:
        method = "attention" if variant.method == "none" else variant.method
        heatmap = Heatmap(network, method, state_layer=heatmap_layer, compiled=compiled,
                          gradient_method=gradient_method)  # fmt: skip
        step = step_of(variant, batches, heatmap, optimizer, accelerator)
        try:
            step(0)  # before it is measured: the first step allocates what stays
            peaks[variant] = peak_memory(partial(step, 0), device)
            trials[variant] = lambda turn, step=step: {"seconds": seconds_of(partial(step, turn), device)}
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
    seconds = {variant: found["seconds"] for variant, found in take_turns(trials, rounds, warmup=2).items()}
    return [_row(variant, seconds, peaks) for variant in variants]


def _row(variant: Variant, seconds: dict[Variant, np.ndarray], peaks: dict[Variant, float | None]) -> dict:
    fits, base = variant in seconds, seconds.get(Variant())
    low, median, high = np.quantile(seconds[variant], (0.25, 0.5, 0.75)).tolist() if fits else (None,) * 3
    row = {
        "name": variant.name, "method": variant.method, "trained": variant.trained, "images": variant.images,
        "every": METHODS[variant.method].every if variant.method in METHODS else 1, "out_of_memory": not fits,
        "seconds_low": low, "seconds_median": median, "seconds_high": high, "peak_memory": peaks.get(variant),
    }  # fmt: skip
    known = fits and base is not None
    interval = bootstrap_interval(seconds[variant] / base - 1, np.median) if known else (None,) * 3
    lazy = interval[1] / row["every"] if known and variant.trained else None
    names = ("overhead_low", "overhead_median", "overhead_high", "overhead_lazy")
    return row | dict(zip(names, (*interval, lazy), strict=True))


def measure_overhead(config: OverheadConfig) -> list[dict]:
    """Rows of `time_losses` on drawn pictures, printed and written; `python -m fsc147lib overhead` calls this."""
    model = load_or_shape(config.model, make_accelerator(config.precision).device.type)
    with tempfile.TemporaryDirectory() as folder:
        samples = drawn_samples(config.batches * config.batch_size, Path(folder), config.image_size)
        rows = time_losses(
            model, samples, config.methods, config.batch_size, config.rounds, config.heatmap_layer,
            model.recipe.train_vision, config.precision, config.compile, config.gradient_method,
        )  # fmt: skip
    if config.json is not None:
        write_report(config.json, {"rows": rows}, config)
    print(table(rows))
    return rows
