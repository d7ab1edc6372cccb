"""A run, put together: its options, images, model, step and folder."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate.utils import set_seed

from ..data.fsc147 import MAX_PIXELS, Sample, open_split
from ..evaluation.answering import Reading, answering_tokens, evaluate_samples
from ..evaluation.metrics import constant_baselines
from ..model.collate import Batch, Collate
from ..model.device import choose_compute, default_workers
from ..model.heatmaps import METHODS, make_heatmap, method_names
from ..model.load import load_model
from ..model.network import Recipe, compile_layers, save_memory
from ..model.pixels import PixelStore
from ..options import ConfigError, Precision, need
from .batches import SizeBatches, make_loader, windows
from .controls import ATTENTION_TARGETS, controlled, need_other_images
from .interrupt import Signals
from .losses import ATTENTION_LOSSES, DualLoss
from .run import RunFolder, TrainResult
from .step import SCHEDULES, TrainingStep, make_accelerator, make_optimizer


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune with both losses; --preset seed, quick or full gives the options below other defaults."""

    PRESETS: ClassVar[dict[str, dict]] = {
        "seed": {"attention_weight": 0.1, "learning_rate": 2e-6, "accumulation": 8},
        "quick": {"epochs": 1, "limit": 200},
        "full": {"epochs": 10},
    }
    """What this project's first script trained with, and its two launches."""

    data: Path
    """Folder in FSC147's official layout."""
    out: Path = Path("runs/train")
    """Folder of the run: metrics.jsonl, config.json, best/ and last/."""
    model: str = "tiny"
    """"tiny", a folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    epochs: int = 1
    """How often each training image is shown; each epoch ends in a validation and a checkpoint."""
    batch_size: int = 16
    """Images of one forward pass."""
    batch_tokens: int | None = None
    """Split a batch into passes of at most so many tokens, padding included: the same step in less memory."""
    accumulation: int = 1
    """Batches of one step, whose gradients are added up: as one batch so many times as large, in less memory."""
    learning_rate: float | None = None
    """Highest learning rate; None for that of the model's own recipe, 1e-5 where it has none."""
    weight_decay: float = 0.05
    """AdamW's pull of matrices towards 0, times the learning rate; norms and biases are spared."""
    warmup: float = 0.1
    """Part of all steps on which the learning rate rises."""
    schedule: str = "cosine"
    """The learning rate after the warmup: cosine or linear to 0, or constant."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    attention_weight: float = 0.5
    """Weight w of the attention loss; 0 trains on counts alone.  Chosen in docs/study.md."""
    attention_loss: str = "kl"
    """How heatmap and target are compared: KL(target || heatmap) in nats, or the squared error summed over cells."""
    attention_target: str = "objects"
    """What the heatmap is drawn to: the objects, or as a control another image's objects or a blob in the centre."""
    heatmap: str = "attention"
    """What is held against the target: attention, token_gradient, input_gradient, or a method of your own."""
    heatmap_every: int | None = None
    """Apply the attention loss on each K-th step, K times as strong; None for the method's own K."""
    heatmap_images: int | None = None
    """Look at so many random images of each batch, and weigh them for all; None for the method's own number."""
    attention_layers: tuple[int, ...] | None = None
    """Layers whose attention is trained; None for four over the second half."""
    attention_heads: tuple[int, ...] | None = None
    """Heads whose attention is trained; None for all."""
    unfreeze_vision_at: int | None = None
    """First epoch (from 0) that trains the vision encoder; None for the recipe's: 0 or, where it has none, never."""
    flip: bool = True
    """Show images mirrored half of the time."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU (fp16 on one that has no bf16), fp32 elsewhere.  What trains is fp32 in all."""
    gradient_checkpointing: bool = False
    """Less memory for more time: 1.23 times a step of the tiny model on two CPU cores."""
    seed: int = 0
    """Of random weights, order and mirroring: the same seed gives the same run on the same machine."""
    limit: int | None = None
    """Only so many images of each split."""
    category: str | None = None
    """What all images show; the root then needs no class file."""
    exclude: Path | None = None
    """List of training images to leave out, a name a line, as `check --exclude` writes it."""
    max_pixels: int = MAX_PIXELS
    """Largest image, in pixels; Pillow's own limit of 179 million stays."""
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
    """Go on from `out`/last, to the same end."""
    overwrite: bool = False
    """Remove an earlier run in `out`."""

    def __post_init__(self):
        for name, known in (
            ("heatmap", method_names(True)), ("attention_loss", ATTENTION_LOSSES), ("schedule", SCHEDULES),
            ("attention_target", ATTENTION_TARGETS),
        ):  # fmt: skip
            need(self, name, getattr(self, name) in known, f"one of {', '.join(known)}")
        counts = "epochs", "batch_size", "accumulation", "log_every", "heatmap_every", "heatmap_images", "limit", "lora"
        least = dict.fromkeys((*counts, "max_pixels", "batch_tokens"), 1) | {"workers": 0, "unfreeze_vision_at": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            need(self, name, value is None or value >= smallest, f"at least {smallest}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            need(self, name, value is None or 0 < value < math.inf, "above 0 and finite")
        for name in ("weight_decay", "attention_weight"):
            need(self, name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        need(self, "warmup", 0 <= self.warmup <= 1, "in 0..1")
        need(self, "lora", self.lora is None or not self.resume, "off when resume is on: adapters are merged on saving")
        uncached = self.vision_cache in ("auto", "off")
        need(self, "vision_cache", uncached or self.heatmap != "input_gradient", "off: input_gradient needs pixels")
        need(self, "vision_cache", uncached or self.unfreeze_vision_at != 0, "off: the encoder trains from the start")
        need(self, "overwrite", not (self.overwrite and self.resume), "off when resume is on")

    def open_split(self, split: str) -> list[Sample]:
        """A split's images as this run uses them."""
        exclude = self.exclude if split == "train" else None
        return open_split(self.data, split, self.limit, self.category, exclude, self.max_pixels)

    def resolved(self, recipe: Recipe, precision: str) -> "TrainConfig":
        """The same, with what is left to the model's recipe, the heatmap's method or the machine filled in.

        Raises:
            ConfigError: fp16 cannot hold this heatmap.
        """
        if precision == "fp16" and self.attention_weight and self.heatmap.endswith("_gradient"):
            raise ConfigError(f"{self.heatmap} (--heatmap) is too small for fp16: give attention, or --precision fp32")
        first, method = self.unfreeze_vision_at, METHODS[self.heatmap]
        if first is None:
            first = 0 if recipe.train_vision and not self.lora else self.epochs  # adapters train alone
        return replace(
            self, learning_rate=self.learning_rate or recipe.learning_rate, unfreeze_vision_at=first,
            heatmap_every=self.heatmap_every or method.every, heatmap_images=self.heatmap_images or method.images,
            compile=torch.cuda.is_available() if self.compile is None else self.compile,
        )  # fmt: skip

    def vision_trains(self, epoch: int) -> bool:
        """Whether the vision encoder trains in this epoch (from 0), once `resolved`."""
        return epoch >= self.unfreeze_vision_at

    @property
    def caches_vision(self) -> bool:
        """Whether the vision encoder's outputs are kept: it must be frozen, and used again."""
        frozen = min(self.unfreeze_vision_at, self.epochs)
        if self.vision_trains(0) or self.heatmap == "input_gradient":
            return False
        return frozen >= 2 if self.vision_cache == "auto" else self.vision_cache != "off"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)


class Run:
    """One training run, put together: images, model (a `CountingModel`, or the config's), step and folder."""

    def __init__(self, config: TrainConfig, on_log=None, on_epoch=None, model=None, signals=None):
        self.on_log, self.on_epoch, self.signals = on_log, on_epoch, signals or Signals()
        self.folder = RunFolder(config)
        set_seed(config.seed)
        self.compute = choose_compute(config.precision)
        self.accelerator = make_accelerator(self.compute)
        self.samples = {"train": config.open_split("train"), "val": config.open_split("val")}
        need_other_images(config.attention_target, self.samples["train"])
        start = self.folder.checkpoint if config.resume else config.model
        device = "cpu" if config.lora else self.compute.device  # adapters' frozen weights become narrow first
        self.model = model or load_model(start, seed=config.seed, device=device)
        self.config = config = config.resolved(self.model.recipe, self.compute.precision)
        network = self.model.network
        save_memory(network, config.lora, config.gradient_checkpointing, self.compute.precision)
        self.heatmap = make_heatmap(network, config.heatmap, config.attention_layers, config.attention_heads)
        if config.compile:
            compile_layers(network, getattr(self.heatmap, "layers", ()))
        loss = DualLoss(network, self.heatmap, config.attention_loss, config.heatmap_images)
        optimizer = make_optimizer(network, config.learning_rate, config.weight_decay)
        self.training_step = TrainingStep(loss, optimizer, self.accelerator, self.compute, config.clip)
        self.workers = default_workers() if config.workers is None else config.workers
        self.open_loader(pixels=not config.caches_vision)
        self.total_steps = self.batches.steps * config.epochs
        self.step, self.epoch, self.saved = 0, 0, 0  # steps and epochs done so far, and the checkpoint's steps
        self.torn = False  # within an update
        self.fingerprint: dict[str, str] = {}  # of the images, once the run is open
        train, val = ([sample.count for sample in self.samples[split]] for split in ("train", "val"))
        self.result = TrainResult(config.out, constant_baselines(train, val), {"train": len(train), "val": len(val)})

    def open_loader(self, pixels: bool) -> None:
        """Open the loader of training batches, with room for all pixels unless the vision cache takes their place."""
        self.stream: Iterator[Batch] | None = None  # the loader's, once `windows` has begun
        config, (train, val) = self.config, self.samples.values()
        self.store = PixelStore([*train, *val], self.model.image_processor, shared=self.workers > 0) if pixels else None
        self.collate = Collate(self.model.tokenizer, self.model.image_processor, self.store, pixels=pixels)
        self.batches = SizeBatches(
            [self.collate.lengths(sample) for sample in train], config.batch_size, config.seed, config.flip,
            config.batch_by_size, config.accumulation, self.accelerator.num_processes, config.batch_tokens,
        )  # fmt: skip
        self.loader = self.accelerator.prepare(make_loader(train, self.batches, self.collate, self.workers))

    @property
    def pass_tokens(self) -> int:
        """Tokens of the heaviest training pass, padding included."""
        longest = max(tokens for *_, tokens in self.batches.lengths)
        return self.config.batch_tokens or self.config.batch_size * longest

    def windows(self, epoch: int, done: int = 0) -> Iterator[list[Batch]]:
        """Each step's batches of an epoch but those done; who reads ahead goes on into the next, which is to follow."""
        config, features = self.config, self.training_step.features
        if self.stream is None:
            self.batches.start(epoch, done)
            self.stream = iter(features.ahead(self.loader) if features else self.loader)
        stream = controlled(self.stream, config.attention_target, self.samples["train"], f"{config.seed} {epoch}")
        return windows(stream, self.batches.sizes(epoch, done))

    def restore(self) -> None:
        """Go on from the folder's checkpoint."""
        state, step = self.folder.restore(self.training_step.optimizer, self.fingerprint), self.training_step
        self.result.steps, self.result.epochs = state["steps"], state["epochs"]
        self.step, self.epoch, self.saved = state["step"], state["epoch"], state["step"]
        if state.get("scaler"):
            step.scaler.load_state_dict(state["scaler"])
        if self.folder.writes:
            self.folder.rewrite(self.result, self.step)

    def save(self) -> None:
        """Write a checkpoint.  Within an epoch, the one before counts as the last whole one."""
        if not self.folder.writes:
            return
        result, step = self.result, self.training_step
        state = {"step": self.step, "epoch": result.epochs[-1]["epoch"], "data": self.fingerprint,
                 "steps": result.steps, "epochs": result.epochs, "scaler": step.scaler.state_dict()}  # fmt: skip
        images = self.validation.images if result.epochs[-1]["step"] == self.step else None
        self.folder.save(self.model, step.optimizer, state, result, images)
        self.saved = self.step

    def log(self, line: dict) -> None:
        """Keep a line of metrics.jsonl, and show it to whoever watches."""
        (self.result.epochs if "val" in line else self.result.steps).append(line)
        if self.folder.writes:
            self.folder.log(line)
            if self.on_log:
                self.on_log(line)

    def validate(self) -> None:
        """Evaluate the validation split and log it."""
        reading = Reading(
            batch_tokens=answering_tokens(self.pass_tokens, self.heatmap), workers=self.workers,
            features=self.training_step.features, store=self.store,
        )  # fmt: skip
        counts = [sample.count for sample in self.samples["train"]]
        self.validation = evaluate_samples(
            self.model, self.samples["val"], self.heatmap, self.compute, counts, reading
        )  # fmt: skip
        self.log({"step": self.step, "epoch": self.epoch, "val": self.validation.metrics})
        if self.on_epoch:
            self.on_epoch(self.model)
