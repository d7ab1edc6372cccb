"""The loop: both losses, schedule, precision, accumulation, validation, checkpoints and tracking.

A run is a folder: `config.json`, `metrics.jsonl` (a line every few steps, and one for each epoch),
`summary.json` (validation before, best and last), `best/` and `last/` (checkpoints), `wandb/`.  The
same seed on the same machine gives the same run, and a run that was stopped goes on with `resume` at
the last whole epoch to the very same end.

Left out: what a loss or a metric is, and drawing.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import wandb
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.fsc147 import open_split
from ..evaluation.answering import answering_batch_size, evaluate_samples
from ..evaluation.metrics import constant_baselines
from ..files import recover_folder, set_aside, write_text
from ..model.adapt import add_lora, freeze_vision
from ..model.collate import Batch
from ..model.device import default_workers, make_accelerator
from ..model.heatmaps import METHODS, Heatmap, method_names
from ..model.load import load_model
from ..model.network import CountingModel
from ..model.pixels import PixelStore
from ..model.vision_cache import VisionCache
from ..options import ConfigError, Precision, need
from .batches import training_loader
from .checkpoint import link_checkpoint, load_training_state, save_checkpoint
from .losses import DualLoss, LossParts, check_finite

MAY_CHANGE = {
    "data", "out", "workers", "compile", "vision_cache", "log_every", "tracking", "resume", "overwrite",
}  # fmt: skip
"""Fields that a resumed run may give anew; with any other it would not be the same run."""


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
    heatmap: str = "attention"
    """What is held against the target: attention, token_gradient, input_gradient, or a method of your own."""
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
        need(self, "heatmap", self.heatmap in method_names(True), f"one of {', '.join(method_names(True))}")
        for name in ("epochs", "batch_size", "accumulation", "log_every"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("heatmap_every", "heatmap_images"):
            need(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        need(
            self, "learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0 and finite"
        )
        need(self, "warmup", 0 <= self.warmup <= 1, "in 0..1")
        need(self, "clip", 0 < self.clip < math.inf, "above 0 and finite")
        need(self, "weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite")
        need(self, "attention_weight", 0 <= self.attention_weight < math.inf, "at least 0 and finite")
        need(self, "limit", self.limit is None or self.limit >= 1, "at least 1")
        need(self, "workers", self.workers is None or self.workers >= 0, "at least 0")
        need(self, "lora", self.lora is None or self.lora >= 1, "at least 1")
        need(self, "lora", self.lora is None or not self.resume, "off when resume is on: adapters are merged on saving")
        need(
            self, "vision_cache", self.vision_cache in ("auto", "off") or self.heatmap != "input_gradient",
            "off with input_gradient, which needs the encoder in each step",
        )  # fmt: skip
        need(
            self, "vision_cache", self.vision_cache in ("auto", "off") or not self.vision_trains(0),
            "off when the vision encoder trains from the start",
        )  # fmt: skip
        need(self, "unfreeze_vision_at", self.unfreeze_vision_at is None or self.unfreeze_vision_at >= 0, "at least 0")
        need(self, "overwrite", not (self.overwrite and self.resume), "off when resume is on")

    @property
    def resolved_learning_rate(self) -> float:
        return self.learning_rate or (3e-3 if self.model == "tiny" else 1e-5)

    @property
    def resolved_heatmap_every(self) -> int:
        return self.heatmap_every or METHODS[self.heatmap].every

    @property
    def resolved_heatmap_images(self) -> int | None:
        return self.heatmap_images or METHODS[self.heatmap].images

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


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        out: the run's folder.
        steps: the step lines of metrics.jsonl: step, epoch, count_loss, attention_loss (None on steps
            without it), total, learning_rate, gradient_norm, images_per_second.
        epochs: one validation for each epoch, the first from before training (epoch 0).
        baselines: `metrics.constant_baselines` on the validation split.
    """

    out: Path
    steps: list[dict]
    epochs: list[dict]
    baselines: dict[str, dict[str, float]]

    def summary(self) -> dict:
        """Validation `before` training, `best` (lowest MAE, with its epoch) and `last`, and the baselines."""
        rows = [{"epoch": line["epoch"], **line["val"]} for line in self.epochs]
        best = min(rows[1:], key=lambda row: row["mae"])
        return {"before": rows[0], "best": best, "last": rows[-1], "baselines": self.baselines}


def make_optimizer(config: TrainConfig, network: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW on all weights; matrices decay, norms and biases do not.  Frozen weights get no gradient, so no update."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.resolved_learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first part of the steps, then half a cosine to 0; step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def windows(batches, size: int) -> Iterator[list[Batch]]:
    """Groups of `size` batches, the last one maybe smaller: what one optimizer step sees."""
    window = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


class Run:
    """One training run: what the loop holds on to.  `train` makes it and drives it."""

    def __init__(
        self,
        config: TrainConfig,
        on_log: Callable[[dict], None] | None = None,
        model: CountingModel | None = None,  # in place of config.model
    ):
        self.config, self.on_log = config, on_log
        self._check_folder()
        set_seed(config.seed)
        self.accelerator = make_accelerator(config.precision)
        self.samples = {split: open_split(config.data, split, config.limit) for split in ("train", "val")}
        self.model = model or load_model(config.out / "last" if config.resume else config.model, seed=config.seed)
        network = self.model.network
        if config.lora:
            add_lora(network, config.lora, narrow=self.accelerator.mixed_precision == "bf16")
        if config.gradient_checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
        self.workers = default_workers() if config.workers is None else config.workers
        self.cache: VisionCache | None = None
        self.optimizer = make_optimizer(config, network)
        self.store = None if config.caches_vision else self.pixel_store()
        loader = self.training_loader()
        self.heatmap = Heatmap(
            network, config.heatmap, config.attention_layers, config.attention_heads, config.heatmap_layer,
            compiled=torch.cuda.is_available() if config.compile is None else config.compile,
        )  # fmt: skip
        loss = DualLoss(
            network, config.attention_weight, config.attention_loss, self.heatmap, config.resolved_heatmap_images
        )
        self.batches = loader.batch_sampler
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.loss, self.loader = self.accelerator.prepare(loss, loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.accumulation)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.step, self.epoch, self.best = 0, 0, math.inf
        counts = {split: [sample.count for sample in part] for split, part in self.samples.items()}
        self.result = TrainResult(config.out, [], [], constant_baselines(counts["train"], counts["val"]))
        self.unchecked: list[tuple[list[str], dict[str, torch.Tensor]]] = []  # steps whose numbers lie on the device
        self.tracker = None

    def open(self) -> None:
        """Take the folder: an earlier run in it is set aside until this one's first checkpoint."""
        self.accelerator.wait_for_everyone()  # all have looked at the folder; from here one writes
        if self.config.resume:
            self._restore()
        if self.accelerator.is_main_process:
            if not self.config.resume:
                set_aside(self.config.out)
            write_text(self.config.out / "config.json", self.config.to_json())
            (self.config.out / "metrics.jsonl").touch()
        self.tracker = self._start_tracker()
        if self.config.caches_vision and not self.config.vision_trains(self.epoch):
            train = self.samples["train"]
            mirrored = [sample.flipped() for sample in train] if self.config.flip else []
            self.cache = VisionCache(
                self.model, [*train, *mirrored, *self.samples["val"]], self.accelerator,
                self.config.vision_cache, self.config.out.parent / "vision-cache", self.workers,
                compiled=self.heatmap.compiled,
            )  # fmt: skip

    def close(self) -> None:
        """End tracking; a run that came to nothing gives the folder back to the one that it was to replace."""
        if self.tracker is not None:
            self.tracker.finish()
        out = self.config.out
        if not self.accelerator.is_main_process:
            return
        if not (out / "last").is_dir() and out.with_name(out.name + ".old").exists():
            shutil.rmtree(out, ignore_errors=True)
            recover_folder(out)

    def training_loader(self) -> DataLoader:
        config = self.config
        return training_loader(
            self.samples["train"], self.model, self.store, config.batch_size, config.seed, config.flip,
            config.batch_by_size, self.workers,
        )  # fmt: skip

    def pixel_store(self) -> PixelStore:
        """Room for all images, shared with the workers."""
        samples = [*self.samples["train"], *self.samples["val"]]
        return PixelStore(samples, self.model.image_processor, shared=self.workers > 0)

    def _check_folder(self) -> None:
        out, config = self.config.out, self.config
        recover_folder(out / "last")
        started = (out / "config.json").is_file() and (out / "metrics.jsonl").is_file()
        finished_epoch = (out / "last").is_dir()
        if config.resume:
            if not finished_epoch:
                raise ConfigError(f"there is nothing to resume in {out}: no epoch of a run was finished there")
            _need_same_run(config)
        elif finished_epoch and not config.overwrite:
            raise ConfigError(f"{out} holds a run already: name another --out, go on with --resume, or --overwrite it")
        elif not started and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} holds something that is no run: name another --out (it is left alone)")

    def _restore(self) -> None:
        state = load_training_state(self.config.out / "last", self.optimizer)
        if state["data"] != self.fingerprint():
            raise ConfigError(
                f"the training or validation images in {self.config.data} are not those that the run in "
                f"{self.config.out} was started with: give its --data, or start a new run with another --out"
            )
        self.step, self.epoch, self.best = state["step"], state["epoch"], state["best"]
        self.result.steps, self.result.epochs = state["steps"], state["epochs"]
        if not self.accelerator.is_main_process:
            return
        if self.best == state["epochs"][-1]["val"]["mae"]:  # a crash may have come between last/ and best/
            link_checkpoint(self.config.out / "last", self.config.out / "best")
        lines = sorted([*state["steps"], *state["epochs"]], key=lambda line: (line["step"], "val" in line))
        write_text(self.config.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def fingerprint(self) -> str:
        """Of the names and counts that the run trains and validates on."""
        listed = {split: [(s.name, s.count) for s in part] for split, part in self.samples.items()}
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def _start_tracker(self):
        os.environ.setdefault("WANDB_SILENT", "true")  # it would print into every notebook
        return wandb.init(
            project="fsc147lib", name=self.config.out.name, dir=self.config.out,
            mode=self.config.tracking if self.accelerator.is_main_process else "disabled",
            config=json.loads(self.config.to_json()),
        )  # fmt: skip

    def log(self, line: dict) -> None:
        """Append to metrics.jsonl and hand on to the tracker and to whoever watches."""
        (self.result.epochs if "val" in line else self.result.steps).append(line)
        if not self.accelerator.is_main_process:
            return
        with (self.config.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracker.log(line)
        if self.on_log:
            self.on_log(line)

    def validate(self) -> dict[str, float]:
        """Evaluate the validation split and log it; returns the metrics."""
        batch_size = answering_batch_size(self.config.batch_size, self.heatmap)
        evaluation = evaluate_samples(
            self.model, self.samples["val"], batch_size, self.heatmap, self.accelerator, self.workers,
            self.cache, self.store,
        )  # fmt: skip
        self.log({"step": self.step, "epoch": self.epoch, "val": evaluation.metrics})
        return evaluation.metrics

    def _unfreeze_vision(self) -> None:
        """Drop the kept image features, which are about to be wrong, and load pixels instead."""
        self.cache, self.store = None, self.pixel_store()
        loader = self.training_loader()
        self.batches, self.loader = loader.batch_sampler, self.accelerator.prepare(loader)

    def train_epoch(self, progress: tqdm) -> None:
        config = self.config
        trains = config.vision_trains(self.epoch)
        freeze_vision(self.model.network, not trains)
        if trains and not self.loader.collate_fn.pixels:
            self._unfreeze_vision()
        self.batches.shuffle(self.epoch)
        self.loss.train()
        images, started, every = 0, time.perf_counter(), config.resolved_heatmap_every
        for window in windows(self.loader, config.accumulation):
            factor = learning_rate_factor(self.step, self.total_steps, config.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = config.resolved_learning_rate * factor
            parts, norm = self.train_step(window)
            self.step += 1
            images += sum(len(batch["names"]) for batch in window)
            progress.update()
            if self.step % config.log_every == 0 or self.step == 1 or parts.attention is not None and every > 1:
                self.check()
                line = {name: None if value is None else float(value) for name, value in asdict(parts).items()}
                speed = images / (time.perf_counter() - started)
                images, started = 0, time.perf_counter()
                self.log({
                    "step": self.step, "epoch": self.epoch + 1, "count_loss": line["count"],
                    "attention_loss": line["attention"], "total": line["total"],
                    "learning_rate": self.optimizer.param_groups[0]["lr"], "gradient_norm": float(norm),
                    "images_per_second": speed,
                })  # fmt: skip
                progress.set_postfix({name: f"{value:.3f}" for name, value in line.items() if value is not None})
        self.check()
        self.epoch += 1

    def check(self) -> None:
        """Look at the losses and gradient norms of the steps since the last time: one wait for many steps."""
        steps, self.unchecked = self.unchecked, []
        check_finite(steps)

    def train_step(self, window: list[Batch]) -> tuple[LossParts, torch.Tensor]:
        """One optimizer step on a window of batches; returns the window's losses and the gradient's norm."""
        accelerator = self.accelerator
        tokens, images = self.window_sizes(window)
        summed = LossParts(*torch.zeros(3, device=accelerator.device))
        weight = self.attention_weight()
        for i, batch in enumerate(window):
            batch = self.cache.add_to(batch) if self.cache else batch
            with accelerator.no_sync(self.loss) if i + 1 < len(window) else nullcontext():
                parts = self.loss(batch, tokens, images, weight)
                accelerator.backward(parts.total * accelerator.num_processes)  # whose gradients are averaged
            for name in ("total", "count", "attention"):
                setattr(summed, name, getattr(summed, name) + getattr(parts, name).detach())
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        numbers = {"count loss": summed.count, "attention loss": summed.attention, "gradient's norm": norm}
        self.unchecked.append(([name for batch in window for name in batch["names"]], numbers))
        if not weight:
            summed.attention = None  # not looked at, which is not 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return summed, norm

    def window_sizes(self, window: list[Batch]) -> tuple[int | torch.Tensor, int | torch.Tensor]:
        """Answer tokens and images of a window, over all processes."""
        sizes = [sum(batch["answer_tokens"] for batch in window), sum(len(batch["names"]) for batch in window)]
        if self.accelerator.num_processes == 1:
            return sizes[0], sizes[1]
        tokens, images = self.accelerator.reduce(torch.tensor(sizes, device=self.accelerator.device))
        return tokens, images

    def attention_weight(self) -> float:
        """This step's weight of the attention loss: K times as strong on each K-th step, none between.

        So the expected gradient is the same at 1/K of the cost: the lazy regularisation of Karras et
        al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).
        """
        every = self.config.resolved_heatmap_every
        return self.config.attention_weight * every if self.step % every == 0 else 0.0

    def save(self, metrics: dict[str, float]) -> None:
        """Write last/, and best/ if the validation MAE is the lowest so far."""
        if not self.accelerator.is_main_process:
            return
        better = metrics["mae"] < self.best
        self.best = min(self.best, metrics["mae"])
        state = {"step": self.step, "epoch": self.epoch, "best": self.best, "data": self.fingerprint(),
                 "steps": self.result.steps, "epochs": self.result.epochs}  # fmt: skip
        last, best = self.config.out / "last", self.config.out / "best"
        save_checkpoint(last, self.model, self.optimizer, state)
        if better:
            link_checkpoint(last, best)
        shutil.rmtree(self.config.out.with_name(self.config.out.name + ".old"), ignore_errors=True)
        write_text(self.config.out / "summary.json", json.dumps(self.result.summary(), indent=1))


def _need_same_run(config: TrainConfig) -> None:
    path = config.out / "config.json"
    try:
        saved, now = json.loads(path.read_text()), json.loads(config.to_json())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): start a new run from {config.out}/last as --model"
        ) from error
    for name in now.keys() - MAY_CHANGE:
        if now[name] != saved.get(name):
            raise ConfigError(
                f"{name} is {now[name]}, but the run in {config.out} was started with {saved.get(name)}: "
                "resume with the same value, or start a new run with another --out"
            )


def train(config: TrainConfig, on_log: Callable[[dict], None] | None = None) -> TrainResult:
    """Fine-tune a model; `python -m fsc147lib train` calls this.

    Args:
        config: what to do; the run's folder is `config.out`.
        on_log: called with each line of metrics.jsonl as it is written, for a live curve.

    Returns:
        The run's history.  The weights are in `out/best` and `out/last`.

    Raises:
        ConfigError, DataError, ModelError: before the first step, with the cure in the message.
        NonFiniteLoss: during training; `last/` holds the last whole epoch.
    """
    run = Run(config, on_log)
    try:
        run.open()
        if run.epoch == 0:
            run.validate()
        with tqdm(total=run.total_steps, initial=run.step, desc="train") as progress:
            while run.epoch < config.epochs:
                run.train_epoch(progress)
                run.save(run.validate())
    finally:
        run.close()
    return run.result
