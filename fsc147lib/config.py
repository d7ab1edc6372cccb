"""Dataclasses that are also the command line: `TrainConfig(epochs=2)` is `train --epochs 2`.

Left out: what the commands do.  Values are checked where a config is made, so that a long run does not
end on a typing error.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from tyro.conf import Positional

HEATMAP_EVERY = {"token_gradient": 32, "input_gradient": 64}
"""Default K of methods that cannot be paid on each step: spread over K steps they are within 6.5 % (notebook 02)."""

HEATMAP_IMAGES = {"token_gradient": 8, "input_gradient": 4}
"""How many images of a batch they look at by default; more would not fit beside a large batch."""

Precision = Literal["auto", "fp32", "bf16"]
TrainableHeatmap = Literal["attention", "token_gradient", "input_gradient"]


class ConfigError(ValueError):
    """A value of a config cannot be used; the message names the field."""


def _need(config, name: str, holds: bool, rule: str) -> None:
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name} ({flag}) is {getattr(config, name)}, but must be {rule}")


@dataclass(frozen=True)
class CheckConfig:
    """Count what an FSC147 root holds and list every fault, by file.  Exit status 1 if there are faults."""

    root: Positional[Path]
    """Folder in the official layout."""
    json: Path | None = None
    """Write the report here too."""

    def __post_init__(self):
        _need(self, "json", self.json is None or not self.json.is_dir(), "a file, not a folder")


@dataclass(frozen=True)
class SynthConfig:
    """Draw a small data set in FSC147's official layout."""

    out: Positional[Path]
    """Folder to make."""
    train: int = 800
    """Pictures in each split."""
    val: int = 100
    test: int = 50
    seed: int = 0
    """The same seed draws the same bytes."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Answer a split and measure counts and maps."""

    data: Path
    """Folder in FSC147's official layout."""
    model: str = "tiny"
    """"tiny", a folder such as runs/train/best, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    split: str = "val"
    batch_size: int = 16
    json: Path | None = None
    """Write metrics here, and each image to the same name with .csv."""
    limit: int | None = None
    """Only so many images."""
    precision: Precision = "auto"
    heatmap: Literal[TrainableHeatmap, "attention_x_gradient"] = "attention"
    """What is held against the target."""
    heatmap_layer: int = 0
    """Of token_gradient: the layer that its tokens enter."""
    attention_layers: tuple[int, ...] | None = None
    """Layers of the heatmap; None for four over the second half."""
    attention_heads: tuple[int, ...] | None = None
    """Heads of the heatmap; None for all."""
    workers: int | None = None
    """Processes that read images; None: up to 8 on a GPU, else 0."""
    compile: bool | None = None
    """Compile the layers with torch.compile; None: on a GPU."""

    def __post_init__(self):
        if self.json is not None:
            _need(self, "json", self.json.suffix != ".csv", "another name: the images go to the .csv beside it")
            _need(self, "json", not self.json.is_dir(), "a file, not a folder")
        _need(self, "batch_size", self.batch_size >= 1, "at least 1")
        _need(self, "limit", self.limit is None or self.limit >= 1, "at least 1")
        _need(self, "workers", self.workers is None or self.workers >= 0, "at least 0")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time a training step with the count loss alone against one with each heatmap, computed only, and trained."""

    model: str = "tiny"
    """"tiny", a folder, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes, nothing to download."""
    methods: tuple[TrainableHeatmap, ...] = get_args(TrainableHeatmap)
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
            _need(self, name, getattr(self, name) >= 1, "at least 1")
        _need(self, "image_size", min(self.image_size) >= 32, "at least 32 pixels each")
        if self.json is not None:
            _need(self, "json", self.json.suffix != ".csv", "another name: the rows also go to the .csv beside it")


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune with both losses."""

    data: Path
    """Folder in FSC147's official layout."""
    out: Path = Path("runs/train")
    """Folder of the run: metrics.jsonl, config.json, best/ and last/."""
    model: str = "tiny"
    """"tiny", a folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    epochs: int = 1
    batch_size: int = 16
    """Images of one forward pass."""
    accumulation: int = 1
    """Forward passes of one step."""
    learning_rate: float | None = None
    """Peak; None is 3e-3 for the tiny model (random weights) and 1e-5 for a trained one."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Part of all steps on which the learning rate rises; it falls along a cosine after."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    attention_weight: float = 0.1
    """Weight w of the attention loss; 0 trains on counts alone."""
    attention_loss: Literal["kl", "mse"] = "kl"
    heatmap: TrainableHeatmap = "attention"
    """What is held against the target: where the attention goes, or what the answer's gradient depends on."""
    heatmap_layer: int = 0
    """Of token_gradient: the layer that its tokens enter; higher is cheaper."""
    heatmap_every: int | None = None
    """Apply the attention loss on each K-th step, K times as strong; None for the method's own K."""
    heatmap_images: int | None = None
    """Look at so many random images of each batch, and weigh them for all; None for the method's own number."""
    attention_layers: tuple[int, ...] | None = None
    """Layers whose attention is trained; None for four over the second half."""
    attention_heads: tuple[int, ...] | None = None
    """Heads whose attention is trained; None for all."""
    unfreeze_vision_at: int | None = None
    """First epoch (from 0) that trains the vision encoder; None: 0 for the tiny model, never for a trained one."""
    flip: bool = True
    """Show images mirrored half of the time."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU, fp32 elsewhere.  Weights and optimizer are fp32 in both."""
    gradient_checkpointing: bool = False
    """Less memory for more time: 1.23 times a step of the tiny model on two CPU cores."""
    seed: int = 0
    limit: int | None = None
    """Only so many images of each split."""
    batch_by_size: bool = True
    """Put images of like size into one batch: little padding, in an order that still varies."""
    compile: bool | None = None
    """Compile the layers with torch.compile; None: on a GPU."""
    vision_cache: Literal["auto", "gpu", "host", "disk", "off"] = "auto"
    """Where a frozen vision encoder's outputs are kept; auto: the first with room, if two epochs or more use it."""
    lora: int | None = None
    """Train low-rank adapters of this rank on the language model, instead of its weights."""
    workers: int | None = None
    """Processes that read images; None: up to 8 on a GPU, else 0."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    tracking: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases; offline needs no account and no network."""
    resume: bool = False
    """Go on from `out`/last."""
    overwrite: bool = False
    """Remove an earlier run in `out`."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation", "log_every"):
            _need(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("heatmap_every", "heatmap_images"):
            _need(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        _need(
            self, "learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0 and finite"
        )
        _need(self, "warmup", 0 <= self.warmup <= 1, "in 0..1")
        _need(self, "clip", 0 < self.clip < math.inf, "above 0 and finite")
        _need(self, "weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite")
        _need(self, "attention_weight", 0 <= self.attention_weight < math.inf, "at least 0 and finite")
        _need(self, "limit", self.limit is None or self.limit >= 1, "at least 1")
        _need(self, "workers", self.workers is None or self.workers >= 0, "at least 0")
        _need(self, "lora", self.lora is None or self.lora >= 1, "at least 1")
        _need(
            self, "lora", self.lora is None or not self.resume, "off when resume is on: adapters are merged on saving"
        )
        _need(
            self, "vision_cache", self.vision_cache in ("auto", "off") or self.heatmap != "input_gradient",
            "off with input_gradient, which needs the encoder in each step",
        )  # fmt: skip
        _need(
            self, "vision_cache", self.vision_cache in ("auto", "off") or not self.vision_trains(0),
            "off when the vision encoder trains from the start",
        )  # fmt: skip
        _need(self, "unfreeze_vision_at", self.unfreeze_vision_at is None or self.unfreeze_vision_at >= 0, "at least 0")
        _need(self, "overwrite", not (self.overwrite and self.resume), "off when resume is on")

    @property
    def resolved_learning_rate(self) -> float:
        return self.learning_rate or (3e-3 if self.model == "tiny" else 1e-5)

    @property
    def resolved_heatmap_every(self) -> int:
        return self.heatmap_every or HEATMAP_EVERY.get(self.heatmap, 1)

    @property
    def resolved_heatmap_images(self) -> int | None:
        return self.heatmap_images or HEATMAP_IMAGES.get(self.heatmap)

    def vision_trains(self, epoch: int) -> bool:
        """Whether the vision encoder trains in this epoch (from 0)."""
        first = self.unfreeze_vision_at
        if first is None:
            return self.model == "tiny"
        return epoch >= first

    @property
    def caches_vision(self) -> bool:
        """Whether the vision encoder's outputs are kept: it must be frozen, and used again."""
        frozen = self.epochs if self.unfreeze_vision_at is None else min(self.unfreeze_vision_at, self.epochs)
        if self.vision_trains(0) or self.heatmap == "input_gradient":
            return False
        return frozen >= 2 if self.vision_cache == "auto" else self.vision_cache != "off"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)
