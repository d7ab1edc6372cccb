"""The options of a training run, and its parts: images, model, step, loader and folder."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate.utils import set_seed

from ..data.fsc147 import MAX_PIXELS, Sample, open_split
from ..evaluation.answering import Evaluation, Reading, answering_tokens, evaluate_samples
from ..evaluation.metrics import constant_baselines
from ..model.collate import Batch, Collate, PixelStore
from ..model.device import choose_compute, default_workers
from ..model.heatmaps import METHODS, make_heatmap, method_names
from ..model.load import RANDOM, base_name, load_adapters, load_model
from ..model.network import Recipe, compile_layers, save_memory
from ..options import ConfigError, Precision, need
from .batches import SizeBatches, make_loader, windows
from .controls import ATTENTION_TARGETS, controlled, need_other_images
from .interrupt import Signals
from .losses import ATTENTION_LOSSES, DualLoss
from .run import RunFolder, TrainResult
from .step import SCHEDULES, TrainingStep, learning_rate_factor, make_accelerator, make_optimizer


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune with both losses; --preset seed, quick or full changes the defaults of some options."""

    PRESETS: ClassVar[dict[str, dict]] = {
        "seed": {"attention_weight": 0.1, "learning_rate": 2e-6, "accumulation": 8},
        "quick": {"epochs": 1, "limit": 200},
        "full": {"epochs": 10},
    }
    """Options of this project's first script, a quick try, and a full training."""

    data: Path
    """Folder in FSC147's official layout."""
    out: Path = Path("runs/train")
    """Folder of the run: metrics.jsonl, config.json, best/ and last/."""
    model: str = "tiny"
    """"tiny", a folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    epochs: int = 1
    """Passes over the training images; each ends with a validation and a checkpoint."""
    batch_size: int = 16
    """Images of a batch."""
    batch_tokens: int | None = None
    """Largest number of tokens of a forward pass, padding included.  A larger batch takes several passes."""
    accumulation: int = 1
    """Batches of a step, whose gradients are added: the step of one larger batch in less memory."""
    learning_rate: float | None = None
    """Highest learning rate.  None: the model's recipe, or 1e-5 for a model without one."""
    weight_decay: float = 0.05
    """AdamW's weight decay of matrices; norms and biases do not decay."""
    warmup: float = 0.1
    """Share of the steps, 0 to 1, during which the learning rate rises."""
    schedule: str = "cosine"
    """The learning rate after the warmup: cosine (to 0), linear (to 0) or constant."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    attention_weight: float = 0.1
    """Weight w of the attention loss; 0 trains on counts alone.  docs/study.md explains the default."""
    attention_loss: str = "kl"
    """Attention loss: kl (KL(target || heatmap) in nats) or mse (squared error summed over cells)."""
    attention_target: str = "objects"
    """Target of the heatmap: objects, or as a control shuffled (another image's objects) or centre (a central blob)."""
    heatmap: str = "attention"
    """Heatmap method that is trained: attention, token_gradient, input_gradient, or a registered one of your own."""
    heatmap_every: int | None = None
    """Apply the attention loss every K steps, with K times its weight.  None: the method's default K."""
    heatmap_images: int | None = None
    """Number of random images of each batch that the attention loss uses.  None: the method's default number."""
    attention_layers: tuple[int, ...] | None = None
    """Layers whose attention is trained.  None: four layers, spread over the second half."""
    attention_heads: tuple[int, ...] | None = None
    """Heads whose attention is trained.  None: all."""
    unfreeze_vision_at: int | None = None
    """First epoch, from 0, that trains the vision encoder.  None: the model's recipe decides, 0 or never."""
    flip: bool = True
    """Mirror half of the images, chosen anew in each epoch."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU (fp16 on one that has no bf16), fp32 elsewhere.  Weights that train stay fp32."""
    gradient_checkpointing: bool = False
    """Less memory for more time: 1.23 times a step of the tiny model on two CPU cores."""
    seed: int = 0
    """Random seed of weights, order and mirroring: the same seed gives the same run on the same machine."""
    limit: int | None = None
    """Use only the first images of each split, this many."""
    category: str | None = None
    """Category of all images; the root then needs no class file."""
    exclude: Path | None = None
    """File with the names of training images to leave out, one a line, as `check --exclude` writes it."""
    max_pixels: int = MAX_PIXELS
    """Largest image, in pixels, at most Pillow's limit of 179 million."""
    batch_by_size: bool = True
    """Put images of similar length into one batch, for less padding; the order still varies."""
    compile: bool | None = None
    """Compile the layers with torch.compile.  None: only on a GPU."""
    vision_cache: Literal["auto", "gpu", "host", "off"] = "auto"
    """Place of the frozen vision encoder's outputs.  auto: from two epochs on the first with room, or off."""
    lora: int | None = None
    """Rank of LoRA adapters that train in place of the language model's weights; checkpoints hold them alone."""
    workers: int | None = None
    """Processes that read images.  None: up to 8 with a GPU, 0 without."""
    log_every: int = 10
    """Number of steps between two lines of metrics.jsonl."""
    tracking: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline needs neither account nor network."""
    save_every: float = 10.0
    """Minutes between two checkpoints within an epoch; one is written with the next line of metrics.jsonl."""
    checkpoints: bool = True
    """Save a checkpoint after each epoch; off: the weights alone, at the end, so that the run cannot resume."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, to the same end, or to a larger number of epochs."""
    overwrite: bool = False
    """Replace the run that is in `out`."""

    def __post_init__(self):
        tables = {
            "heatmap": method_names(True), "attention_loss": ATTENTION_LOSSES, "schedule": SCHEDULES,
            "attention_target": ATTENTION_TARGETS,
        }  # fmt: skip
        for name, known in tables.items():
            need(self, name, getattr(self, name) in known, f"one of {', '.join(known)}")
        counts = ("epochs", "batch_size", "accumulation", "log_every", "heatmap_every", "heatmap_images", "limit",
                  "lora", "max_pixels", "batch_tokens")  # fmt: skip
        for names, holds, rule in (
            (counts, lambda value: value >= 1, "at least 1"),
            (("workers", "unfreeze_vision_at"), lambda value: value >= 0, "at least 0"),
            (("learning_rate", "clip"), lambda value: 0 < value < math.inf, "above 0 and finite"),
            (("weight_decay", "attention_weight"), lambda value: 0 <= value < math.inf, "at least 0 and finite"),
            (("warmup",), lambda value: 0 <= value <= 1, "in 0..1"),
        ):
            for name in names:
                need(self, name, getattr(self, name) is None or holds(getattr(self, name)), rule)
        need(self, "checkpoints", self.checkpoints or not self.resume, "on when resume is on")
        need(self, "overwrite", not (self.overwrite and self.resume), "off when resume is on")
        known = not self.lora or self.model != RANDOM or not self.seed
        need(self, "seed", known, f"0 with --lora: adapters of {RANDOM} do not say from which seed its weights follow")
        if self.vision_cache not in ("auto", "off"):
            need(self, "vision_cache", self.heatmap != "input_gradient", "off: input_gradient needs pixels")
            need(self, "vision_cache", self.unfreeze_vision_at != 0, "off: the encoder trains from the start")

    def open_split(self, split: str) -> list[Sample]:
        """The images of a split that this run uses."""
        exclude = self.exclude if split == "train" else None
        return open_split(self.data, split, self.limit, self.category, exclude, self.max_pixels)

    def resolved(self, recipe: Recipe, precision: str) -> "TrainConfig":
        """A copy with each None filled in that the model's recipe, the heatmap method or the machine decides.

        Raises:
            ConfigError: the gradients of this heatmap are too small for fp16.
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
        """Whether the vision encoder trains in this epoch, from 0; for a config that is `resolved`."""
        return epoch >= self.unfreeze_vision_at

    @property
    def caches_vision(self) -> bool:
        """Whether the vision encoder's outputs are kept: it must be frozen, with "auto" for two epochs or more."""
        if self.vision_trains(0) or self.heatmap == "input_gradient" or self.vision_cache == "off":
            return False
        return self.vision_cache != "auto" or min(self.unfreeze_vision_at, self.epochs) >= 2

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)


class Run:
    """A training run: its images, model, step, loader and folder, and the numbers of steps and epochs done.

    Args:
        on_log, on_epoch: see `train`.
        model: a `CountingModel` to train; None loads the config's.
    """

    def __init__(self, config: TrainConfig, on_log=None, on_epoch=None, model=None, signals: Signals | None = None):
        self.on_log, self.on_epoch, self.signals = on_log, on_epoch, signals or Signals()
        self.folder = RunFolder(config)
        set_seed(config.seed)
        self.compute = choose_compute(config.precision)
        self.accelerator = make_accelerator(self.compute)
        self.samples = {"train": config.open_split("train"), "val": config.open_split("val")}
        need_other_images(config.attention_target, self.samples["train"])
        device = "cpu" if config.lora else self.compute.device  # below adapters, weights get narrow before they move
        start = self.folder.checkpoint if config.resume and not config.lora else config.model
        base = base_name(start) if config.lora and model is None else config.model
        self.model = model or load_model(start, seed=config.seed, device=device)
        self.config = config = config.resolved(self.model.recipe, self.compute.precision)
        network = self.model.network
        trains_vision = config.vision_trains(config.epochs - 1)
        save_memory(network, config.lora, config.gradient_checkpointing, self.compute.precision, base, trains_vision)
        if config.lora and config.resume:
            load_adapters(network, self.folder.checkpoint)
        self.heatmap = make_heatmap(network, config.heatmap, config.attention_layers, config.attention_heads)
        if config.compile:
            compile_layers(network, getattr(self.heatmap, "layers", ()))
        loss = DualLoss(network, self.heatmap, config.attention_loss, config.heatmap_images)
        optimizer = make_optimizer(network, config.learning_rate, config.weight_decay)
        self.training_step = TrainingStep(loss, optimizer, self.accelerator, self.compute, config.clip)
        self.workers = default_workers() if config.workers is None else config.workers
        self.open_loader(pixels=not config.caches_vision)
        self.total_steps = self.batches.steps * config.epochs
        self.step, self.epoch, self.saved = 0, 0, 0  # steps and epochs that are done, and steps in the last checkpoint
        self.saved_at = time.monotonic()
        self.torn = False  # an update has begun and not ended, so the weights must not be saved
        self.fingerprint: dict[str, str] = {}  # of the images
        self.training_counts, val = ([sample.count for sample in samples] for samples in self.samples.values())
        sizes = {split: len(samples) for split, samples in self.samples.items()}
        self.result = TrainResult(config.out, constant_baselines(self.training_counts, val), sizes)

    def open_loader(self, pixels: bool) -> None:
        """Make the loader of training batches, with their pixels, or without where kept features replace them."""
        self.stream: Iterator[Batch] | None = None  # of the loader, begun by `windows`
        config, train = self.config, self.samples["train"]
        keeps = pixels and not self.workers  # each worker would keep images of its own
        self.store = PixelStore(self.model.image_processor) if keeps else None
        self.collate = Collate(self.model.tokenizer, self.model.image_processor, self.store, pixels=pixels)
        self.batches = SizeBatches(
            [self.collate.lengths(sample) for sample in train], config.batch_size, config.seed, config.flip,
            config.batch_by_size, config.accumulation, self.accelerator.num_processes, config.batch_tokens,
        )  # fmt: skip
        self.loader = self.accelerator.prepare(make_loader(train, self.batches, self.collate, self.workers))

    def trained_bytes(self) -> int:
        """Bytes of the weights that train."""
        return sum(weight.nbytes for weight in self.training_step.parameters if weight.requires_grad)

    def kept_samples(self) -> list[Sample]:
        """All images of the run whose features are kept, mirror images included."""
        train, val = self.samples.values()
        return [*train, *([sample.flipped() for sample in train] if self.config.flip else []), *val]

    def windows(self, epoch: int, done: int = 0) -> Iterator[list[Batch]]:
        """The batches of each step of an epoch after its first `done` steps; epochs must be asked for in order."""
        features = self.training_step.features
        if self.stream is None:
            self.batches.start(epoch, done)
            self.stream = iter(features.ahead(self.loader) if features else self.loader)
        seed = f"{self.config.seed} {epoch}"
        stream = controlled(self.stream, self.config.attention_target, self.samples["train"], seed)
        return windows(stream, self.batches.sizes(epoch, done))

    def restore(self) -> None:
        """Continue from the folder's checkpoint."""
        step = self.training_step
        state = self.folder.restore(step.optimizer, self.fingerprint)
        self.result.steps, self.result.epochs = state["steps"], state["epochs"]
        epochs, config = self.folder.epochs_before(), self.config
        if epochs < config.epochs and self.folder.writes:
            factor = learning_rate_factor(state["step"], self.total_steps, config.warmup, config.schedule)
            rate = f"the learning rate goes on at {config.learning_rate * factor:.3g}"
            print(f"{epochs} epochs become {config.epochs}: the schedule is that of {self.total_steps} steps, {rate}")
        self.step, self.epoch, self.saved = state["step"], state["epoch"], state["step"]
        if state.get("scaler"):
            step.scaler.load_state_dict(state["scaler"])
        if self.folder.writes:
            self.folder.rewrite(self.result, self.step)

    def save(self) -> None:
        """Write a checkpoint.  Its epoch is that of the last validation, also within the next epoch."""
        if not self.folder.writes:
            return
        result, step, last = self.result, self.training_step, self.result.epochs[-1]
        if not self.config.checkpoints:
            if self.epoch == self.config.epochs:
                self.folder.save_weights(self.model, result, self.validation.images)
            return
        state = {"step": self.step, "epoch": last["epoch"], "data": self.fingerprint, "steps": result.steps,
                 "epochs": result.epochs, "scaler": step.scaler.state_dict()}  # fmt: skip
        images = self.validation.images if last["step"] == self.step else None
        self.folder.save(self.model, step.optimizer, state, result, images)
        self.saved, self.saved_at = self.step, time.monotonic()

    def log(self, line: dict) -> None:
        """Add a line to the result and to metrics.jsonl, and pass it to `on_log`."""
        (self.result.epochs if "val" in line else self.result.steps).append(line)
        if self.folder.writes:
            self.folder.log(line)
            if self.on_log:
                self.on_log(line)

    def reading(self) -> Reading:
        """How validation images are read: batches have room where a training pass has."""
        longest = max(tokens for *_, tokens in self.batches.lengths)
        tokens = answering_tokens(self.config.batch_tokens or self.config.batch_size * longest, self.heatmap)
        features = self.training_step.features
        return Reading(batch_tokens=tokens, workers=self.workers, features=features, store=self.store)

    def evaluate(self, samples: list[Sample]) -> Evaluation:
        """Evaluate the model on samples."""
        return evaluate_samples(self.model, samples, self.heatmap, self.compute, self.training_counts, self.reading())

    def validate(self) -> None:
        """Evaluate the validation split, log it and call `on_epoch`."""
        self.validation = self.evaluate(self.samples["val"])
        self.log({"step": self.step, "epoch": self.epoch, "val": self.validation.metrics})
        if self.on_epoch:
            self.on_epoch(self.model)
