"""What the attention loss costs: the same training step with and without it, timed side by side.

Variants take turns on the same batches, so that a machine whose speed drifts slows all of them alike,
and the overhead is a median of ratios taken within a turn.  The large models can be timed at their true
shapes with random weights, on drawn pictures: nothing is downloaded.

Left out: throughput on a data set (`throughput`).
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from transformers import Qwen3VLConfig

from ..data.fsc147 import Sample
from ..data.scenes import draw_scene
from ..evaluation.answering import to_csv
from ..files import write_text
from ..model.adapt import freeze_vision
from ..model.answers import count_loss
from ..model.collate import Batch, Collate, to_device
from ..model.device import make_accelerator
from ..model.heatmaps import METHODS, Heatmap, method_names
from ..model.load import load_model
from ..model.network import CountingModel, random_network
from ..options import Precision, need
from ..training.losses import DualLoss


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time a training step with the count loss alone against one with each heatmap, computed only, and trained."""

    model: str = "tiny"
    """"tiny", a folder, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes, nothing to download."""
    methods: tuple[str, ...] = method_names(trainable=True)
    heatmap_layer: int = 0
    """Of token_gradient: the layer that its tokens enter."""
    image_size: tuple[int, int] = (384, 576)
    """Height and width of the drawn pictures."""
    batch_size: int = 8
    """Of --throughput: at the most; a way that has no room for it takes the half."""
    batches: int = 4
    """Different batches, used in turn."""
    rounds: int = 20
    """Timed steps of each variant; of --throughput: timed blocks of each way."""
    precision: Precision = "auto"
    compile: bool = False
    """Compile the layers; a gradient heatmap that is trained leaves those plain that it differentiates twice."""
    throughput: Path | None = None
    """A data root: measure instead how many of its images a second are trained and answered."""
    steps: int = 8
    """Steps of a block of --throughput."""
    limit: int | None = None
    """Only so many images of the root."""
    vision_cache: Literal["auto", "gpu", "host", "disk"] = "auto"
    validation: bool = True
    """Time validation as well."""
    gradient_checkpointing: bool = False
    lora: int | None = None
    workers: int | None = None
    json: Path | None = None
    """Write the rows here, and to the same name with .csv."""

    def __post_init__(self):
        for name in ("batch_size", "batches", "rounds", "steps"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "image_size", min(self.image_size) >= 32, "at least 32 pixels each")
        if self.json is not None:
            need(self, "json", self.json.suffix != ".csv", "another name: the rows also go to the .csv beside it")


def time_variants(
    variants: dict[Hashable, Callable[[int], None]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[Hashable, np.ndarray]:
    """Time functions in turn: A B C A B C ...

    Args:
        variants: name -> function of the round's number.
        rounds: counted rounds, after `warmup` ones.
        device: on "cuda" each call is waited for.

    Returns:
        name -> [rounds] seconds.
    """
    seconds = {name: np.zeros(rounds) for name in variants}
    for turn in range(-warmup, rounds):
        for name, run in variants.items():
            _wait(device)
            started = time.perf_counter()
            run(turn)
            _wait(device)
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - started
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], None], device: str = "cpu") -> float | None:
    """MiB at the highest point of a call: of the GPU, or else of the whole process.

    The process's peak can be asked anew on Linux alone; elsewhere the answer is None.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    except OSError:
        return None
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


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
    tiny = load_model("tiny")
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
        network = random_network(Qwen3VLConfig(**config))
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


def training_step(loss: DualLoss, variant: Variant, batches: list[Batch], optimizer, accelerator):
    """A whole step as `train` makes it: both passes in its precision, and an update; on batches in turn."""

    def step(turn: int) -> None:
        batch = batches[turn % len(batches)]
        with accelerator.autocast():
            if variant.method != "none" and not variant.trained:
                logits, *_ = loss.heatmap.with_logits(batch)
                total = count_loss(logits, batch["answer_labels"]) / batch["answer_tokens"]
            else:
                total = loss(batch).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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

    Returns:
        A row for each variant: `name`, `method`, `trained`, `images` (of a batch; None for all), `every` (the
        method's default K), `seconds_median`, `seconds_low` and
        `seconds_high` (quartiles), `peak_memory` (MiB); and from the ratios to "count only" within a round
        `overhead_median`, `overhead_low` and `overhead_high` (95 % bootstrap interval), 0.03 for 3 %.
        A variant that ran out of memory has None for all of these and `out_of_memory` true.

    Raises:
        ValueError: fewer samples than one batch.
    """
    if len(samples) < batch_size:
        raise ValueError(f"{len(samples)} samples make no batch of {batch_size}: give more, or a smaller batch size")
    accelerator = make_accelerator(precision)
    device = accelerator.device.type
    network = model.network.to(device).train()
    freeze_vision(network, not train_vision)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)  # one for all: less memory
    collate = Collate(model.tokenizer, model.image_processor)
    starts = range(0, len(samples) - batch_size + 1, batch_size)
    batches = [to_device(collate(samples[start : start + batch_size]), device) for start in starts]
    variants = variants_of(methods, batch_size)
    steps, peaks = {}, {}
    for variant in variants:
        method = "attention" if variant.method == "none" else variant.method
        heatmap = Heatmap(network, method, state_layer=heatmap_layer, compiled=compiled)
        loss = DualLoss(network, 0.1 if variant.trained else 0, heatmap=heatmap, heatmap_images=variant.images)
        step = training_step(loss, variant, batches, optimizer, accelerator)
        try:
            step(0)  # once before it is measured: the first step allocates what stays
            peaks[variant] = peak_memory(partial(step, 0), device)
            steps[variant] = step
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
    seconds = time_variants(steps, rounds, device=device)
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
    interval = median_interval(seconds[variant] / base - 1) if known else (None,) * 3
    return row | dict(zip(("overhead_low", "overhead_median", "overhead_high"), interval, strict=True))


def median_interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval (Efron, 1979): low, median, high."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), (0.025, 0.975))
    return float(low), float(np.median(values)), float(high)


def table(rows: list[dict]) -> str:
    """The rows of `time_losses` as text."""
    lines = [
        f"{'variant':<30}{'ms per step (quartiles)':>26}{'overhead (95 % interval)':>30}{'peak MiB':>10}{'over K':>14}"
    ]
    for row in rows:
        if row["out_of_memory"]:
            lines.append(f"{row['name']:<30}{'out of memory':>26}")
            continue
        low, median, high = (1000 * row[f"seconds_{key}"] for key in ("low", "median", "high"))
        overhead = "unknown"
        if row["overhead_median"] is not None:
            overhead = "{overhead_median:.1%} ({overhead_low:.1%} to {overhead_high:.1%})".format(**row)
        peak = "unknown" if row["peak_memory"] is None else f"{row['peak_memory']:.0f}"
        spread = ""
        if row["trained"] and row["overhead_median"] is not None:
            spread = f"{row['overhead_median'] / row['every']:.1%} (K={row['every']})"
        time_taken = f"{median:.0f} ({low:.0f} to {high:.0f})"
        lines.append(f"{row['name']:<30}{time_taken:>26}{overhead:>30}{peak:>10}{spread:>16}")
    return "\n".join(lines)


def write_rows(path: str | Path, rows: list[dict], **about) -> None:
    """Write timings as JSON, with what they were measured on and `about`; the rows alone also as .csv beside it."""
    path = Path(path)
    write_text(path, json.dumps({**about, **machine(), "rows": rows}, indent=1))
    write_text(path.with_suffix(".csv"), to_csv(rows))


def machine() -> dict:
    """What a timing was measured on, and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read_report(path: str | Path) -> tuple[dict, str]:
    """A file of `write_rows`, and a line that says on what, when and how it was measured."""
    report = json.loads(Path(path).read_text())
    processor = report["gpu"] or f"{report['threads']} cores of {report['processor']}"
    versions = f"torch {report['torch']}, transformers {report['transformers']}"
    return report, f"{processor}, {versions}, {report['date']}: {report['command']}"


def write_report(path: Path, config: BenchmarkConfig, report: dict) -> None:
    """Write a benchmark's rows with the machine, the command and its settings; the rows also as .csv."""
    about = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    command = "python -m fsc147lib " + " ".join(sys.argv[1:])
    report = {**about, **report}
    write_rows(path, report.pop("rows"), command=command, **report)


def benchmark(config: BenchmarkConfig) -> list[dict]:
    """Time what was asked for, print the table and write the files; `python -m fsc147lib benchmark` calls this."""
    model = load_or_shape(config.model, make_accelerator(config.precision).device.type)
    with tempfile.TemporaryDirectory() as folder:
        samples = drawn_samples(config.batches * config.batch_size, Path(folder), config.image_size)
        rows = time_losses(
            model, samples, config.methods, config.batch_size, config.rounds, config.heatmap_layer,
            config.model == "tiny", config.precision, config.compile,
        )  # fmt: skip
    if config.json is not None:
        write_report(config.json, config, {"rows": rows})
    print(table(rows))
    return rows
