"""A variant of training in a process of its own: it trains for some steps when asked to, and gives the GPU back.

Variants beside each other in one process press on one another's memory: on an 80 GB card that costs a third of the
speed.  Between two turns a process keeps its compiled layers and its images, and leaves the GPU to the others.

Left out: which turns there are, and what is made of their numbers (`throughput`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..data.fsc147 import open_split
from ..evaluation.answering import answering_batch_size, evaluate_samples
from ..model.adapt import add_lora, freeze_vision
from ..model.collate import Batch, to_device
from ..model.device import default_workers, make_accelerator
from ..model.heatmaps import Heatmap
from ..model.pixels import PixelStore
from ..model.vision_cache import VisionCache
from ..training.batches import training_loader
from ..training.losses import DualLoss
from ..training.step import TrainingStep, make_optimizer
from .overhead import WEIGHT, load_or_shape
from .peers import PlainCollate, PlainLoss, trainer_trial
from .timing import measured_peak, peak_memory, seconds_of, step_flops


@dataclass(frozen=True)
class Variant:
    """One way to train; the switches are those of `TrainConfig`."""

    name: str
    peer: str | None = None  # "loop" or "trainer": not by this library
    by_size: bool = True
    compiled: bool = False
    cached: bool = False
    narrow: bool = False  # parameters and optimizer in bfloat16
    answers: bool = False  # validation is timed as well
    precision: str | None = None


class Trial:
    """A variant, put together at its first turn."""

    def __init__(self, variant: Variant, config, folder: Path):
        set_seed(0)
        self.variant, self.config, self.folder, self.batch_size = variant, config, folder, config.batch_size
        self.accelerator = make_accelerator(variant.precision or config.precision)
        self.device, self.in_bf16 = self.accelerator.device.type, self.accelerator.mixed_precision == "bf16"
        self.samples = {split: open_split(config.data, split, config.limit) for split in ("train", "val")}
        self.workers = default_workers() if config.workers is None else config.workers
        self.model = self.training_step = self.cache = None
        self.found: list[dict] = []  # of each turn
        self.answered: list[float] = []

    # --- What the parent asks for

    def turn(self) -> dict:
        """Train for some steps; a batch that has no room becomes the half, which begins anew.  The row so far."""
        while self.batch_size:
            try:
                self.wake()
                if self.training_step is None:
                    self.begin()
                self.found.append(self.train())
                break
            except torch.cuda.OutOfMemoryError:
                self.training_step, self.found = None, []
            self.rest()  # once the error, and what it holds, is gone
            self.batch_size //= 2
        self.rest()
        return self.row()

    def validate(self) -> dict:
        """Losses, maps and greedy answers of the validation images; not in time: a first pass, which compiles."""
        self.wake()
        samples, heatmap = self.samples["val"], Heatmap(self.model.network, compiled=self.variant.compiled)
        size = answering_batch_size(self.batch_size, heatmap)
        answer = partial(evaluate_samples, self.model, samples, size, heatmap, self.accelerator, self.workers,
                         self.cache, self.store)  # fmt: skip
        if not self.answered:
            answer()
        self.answered.append(len(samples) / seconds_of(answer, self.device))
        self.rest()
        return self.row()

    def losses(self) -> dict:
        """Count losses, step by step, of steps that move the weights."""
        self.wake()
        self.begin()
        for group in self.training_step.optimizer.param_groups:
            group["lr"] = self.config.learning_rate
        parts = [self.step(next(self.batches)) for _ in range(self.config.curves)]
        return {"name": self.variant.name, "batch_size": self.batch_size, "losses": [float(p.count) for p in parts]}

    # --- How

    def wake(self) -> None:
        """Take the GPU: load the model, or bring its weights back."""
        if self.model is None:
            self.model = load_or_shape(self.config.model, self.device)
            network, train = self.model.network, self.samples["train"]
            if self.config.lora:
                add_lora(network, self.config.lora, narrow=self.in_bf16)
            if self.config.gradient_checkpointing:
                network.activation_checkpointing_enable({"use_reentrant": False})
            freeze_vision(network.to(self.device).train(), not self.model.recipe.train_vision)
            if self.variant.narrow:
                network.to(torch.bfloat16)
            self.types = [weight.dtype for weight in network.parameters()]
            self.store = PixelStore([*train, *self.samples["val"]], self.model.image_processor, self.workers > 0)
            if not self.workers:  # as from the second epoch on
                for sample in train:
                    self.store.patches(sample)
        if self.variant.cached and self.cache is None:
            train = self.samples["train"]
            everything = [*train, *(sample.flipped() for sample in train), *self.samples["val"]]
            self.cache = VisionCache(self.model, everything, self.accelerator, self.config.vision_cache,
                                     self.folder, self.workers, compiled=self.variant.compiled)  # fmt: skip
        for weight, dtype in zip(self.model.network.parameters(), self.types, strict=True):
            weight.data = weight.data.to(self.device, dtype)
        if self.cache and self.cache.place == "gpu":
            self.cache.features = self.cache.features.to(self.device)

    def rest(self) -> None:
        """Leave the GPU: weights wait in the host's memory as bfloat16, the optimizer's state is forgotten."""
        self.model.network.zero_grad()
        if self.training_step is not None:
            self.training_step.optimizer.state.clear()
        if self.device == "cuda":
            for weight in self.model.network.parameters():
                weight.data = weight.data.to("cpu", torch.bfloat16)
            if self.cache and self.cache.place == "gpu":
                self.cache.features = self.cache.features.cpu()
            torch.cuda.empty_cache()

    def begin(self) -> None:
        """Make loader and step; one step on the longest images, which tells the memory, and compiles."""
        began, variant, model = time.perf_counter(), self.variant, self.model
        self.loader = training_loader(
            self.samples["train"], model, None if self.cache else self.store, self.batch_size, by_size=variant.by_size,
            workers=self.workers,
        )  # fmt: skip
        loss, optimizer = DualLoss(model.network, heatmap=Heatmap(model.network, compiled=variant.compiled)), None
        if variant.peer:
            loss, optimizer = PlainLoss(model.network), torch.optim.AdamW(model.network.parameters(), lr=1e-6)
            self.loader = DataLoader(
                self.loader.dataset, batch_sampler=self.loader.batch_sampler, collate_fn=PlainCollate(model),
                num_workers=self.workers, pin_memory=self.loader.pin_memory, persistent_workers=self.workers > 0,
            )  # fmt: skip
        optimizer = optimizer or make_optimizer(model.network, 1e-6)
        step = TrainingStep(loss, optimizer, self.accelerator, cache=self.cache)
        lengths = self.loader.batch_sampler.lengths
        longest = sorted(range(len(lengths)), key=lambda i: lengths[i][2])[-self.batch_size :]
        images = [self.loader.dataset[i, False] for i in longest]
        self.training_step = step
        run = partial(self.trainer, images, 1) if variant.peer == "trainer" else partial(self.step_on, images)
        run()
        self.startup = time.perf_counter() - began
        self.peak = peak_memory(run, self.device)
        self.batches = self._forever()
        self.speed = measured_peak(self.accelerator.device, torch.bfloat16 if self.in_bf16 else torch.float32)

    def trainer(self, samples, steps: int) -> dict:
        return trainer_trial(self.model, samples, self.batch_size, steps, self.in_bf16, self.workers)

    def step_on(self, samples) -> None:
        self.step(self.loader.collate_fn(samples))

    def step(self, batch: Batch):
        parts, _ = self.training_step([to_device(batch, self.device)], self.weight)
        return parts

    @property
    def weight(self) -> float:
        return 0 if self.variant.peer or self.config.curves else WEIGHT

    def _forever(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            self.loader.batch_sampler.shuffle(epoch)
            yield from self.loader
            epoch += 1

    def train(self) -> dict[str, float]:
        """Some steps, after one that allocates what stays: images, tokens, patches, seconds, those of waiting."""
        retries = self._retries()
        if self.variant.peer == "trainer":
            return self.trainer(self.samples["train"], self.config.steps) | {"retries": self._retries() - retries}
        self.step(next(self.batches))
        counts = {"images": 0, "tokens": 0, "patches": 0, "places": 0, "waited": 0.0}

        def run() -> None:
            for _ in range(self.config.steps):
                waiting_since = time.perf_counter()
                batch = next(self.batches)
                counts["waited"] += time.perf_counter() - waiting_since
                counts["images"] += len(batch["names"])
                counts["tokens"] += int(batch["attention_mask"].sum())
                counts["places"] += batch["attention_mask"].numel()
                counts["patches"] += sum(h * w for h, w in batch["image_sizes"])
                self.step(batch)
            self.training_step.check()

        return {"seconds": seconds_of(run, self.device), **counts, "retries": self._retries() - retries}

    def _retries(self) -> int:
        """How often the allocator had to give back memory to find some."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self.device == "cuda" else 0

    def row(self) -> dict:
        """Medians over turns, see `throughput.measure_throughput`."""
        if not self.found:
            return {"name": self.variant.name, "out_of_memory": True}
        part = {key: np.array([turn[key] for turn in self.found]) for key in self.found[0]}
        flops = [step_flops(self.model.network.config, *counts, encoder=not self.cache)
                 for counts in zip(part["images"], part["tokens"], part["patches"], strict=True)]  # fmt: skip
        rates = part["images"] / part["seconds"]
        return {
            "name": self.variant.name, "batch_size": self.batch_size, "images_per_second": float(np.median(rates)),
            "peak_share": float(np.median(flops / part["seconds"]) / self.speed), "peak_memory": self.peak,
            "retries": int(part["retries"].sum()), "padding": float(1 - part["tokens"].sum() / part["places"].sum()),
            "waiting": float(np.median(part["waited"] / part["seconds"])) if "waited" in part else None,
            "startup": self.startup, "rates": rates.tolist(), "validation_rates": self.answered,
            "validation_per_second": float(np.median(self.answered)) if self.answered else None,
            "cache": self.cache and {"place": self.cache.place, "bytes": self.cache.features.nbytes},
        }  # fmt: skip


def serve(connection, variant: Variant, config, folder: Path) -> None:
    """The process: answers each name of a method with what it returns, or with `failed`; None ends it."""
    try:
        trial = Trial(variant, config, folder)
        connection.send({})
        while what := connection.recv():
            connection.send(getattr(trial, what)())
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        connection.send({"name": variant.name, "failed": f"{type(error).__name__}: {error}"})
