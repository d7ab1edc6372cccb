"""A variant of training in a process of its own: it trains for some steps when asked to, and gives the GPU back.

Variants beside each other in one process press on one another's memory: on an 80 GB card that costs a third of the
speed.  Between two turns a process keeps its compiled layers and its images, and leaves the GPU to the others.

Left out: which turns there are, and what is made of their numbers (`throughput`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data import Sample
from ..model.collate import Batch, to_device
from ..model.device import free_models, peak_memory, seconds_of
from ..model.network import freeze_vision
from ..training.loop import Run, TrainConfig
from ..training.step import TrainingStep
from .overhead import load_or_shape
from .peers import PlainCollate, PlainLoss, trainer_trial
from .timing import measured_peak, step_flops


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


def settings_of(variant: Variant, config, folder: Path) -> TrainConfig:
    """The run that a variant is, as `train` would be asked for it."""
    return TrainConfig(
        config.data, out=folder / variant.name.replace(" ", "-"), model=config.model, epochs=2,
        batch_size=config.batch_size, precision=variant.precision or config.precision, limit=config.limit,
        gradient_checkpointing=config.gradient_checkpointing, batch_by_size=variant.by_size,
        compile=variant.compiled, lora=config.lora, workers=config.workers, tracking="disabled",
        vision_cache=config.vision_cache if variant.cached else "off",
        learning_rate=config.learning_rate if config.curves else 1e-6,
    )  # fmt: skip


class Trial:
    """A variant as a run, which trains, answers and rests as its parent asks."""

    def __init__(self, variant: Variant, config, folder: Path):
        self.variant, self.config, self.batch_size = variant, config, config.batch_size
        settings = settings_of(variant, config, folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.run = run = Run(settings, model=load_or_shape(config.model, self.device))
        self.in_bf16 = run.accelerator.mixed_precision == "bf16"
        self.network, self.weight = run.model.network, settings.attention_weight
        if variant.peer:
            optimizer = torch.optim.AdamW(self.network.parameters(), settings.learning_rate)
            run.training_step = TrainingStep(PlainLoss(self.network), optimizer, run.accelerator)
        if variant.peer or config.curves:
            self.weight = 0
        freeze_vision(self.network.train(), not run.config.vision_trains(0))
        if variant.narrow:
            self.network.to(torch.bfloat16)
        self.types = [weight.dtype for weight in self.network.parameters()]
        self.opened, self.batches = False, None
        self.found: list[dict] = []  # of each turn
        self.answered: list[float] = []
        self.rest()

    def turn(self) -> dict:
        """Train for some steps; a batch that has no room becomes the half, which begins anew.  The row so far."""
        while self.batch_size:
            try:
                self.wake()
                self.found.append(self.train())
                break
            except torch.cuda.OutOfMemoryError:
                self.batches, self.found = None, []
            self.rest()  # once the error, and what it holds, is gone
            self.batch_size //= 2
        self.rest()
        return row_of(self)

    def validate(self) -> dict:
        """Losses, maps and greedy answers of the validation images; not in time: a first pass, which compiles."""
        self.wake()
        if not self.answered:
            self.run.validate()
        self.answered.append(len(self.run.samples["val"]) / seconds_of(self.run.validate, self.device))
        self.rest()
        return row_of(self)

    def losses(self) -> dict:
        """Count losses, step by step, of steps that move the weights."""
        self.wake()
        found = [float(self.step(next(self.batches)).count) for _ in range(self.config.curves)]
        return {"name": self.variant.name, "batch_size": self.batch_size, "losses": found}

    def wake(self) -> None:
        """Have the GPU: fetch the weights, and before the first step of a batch's size all that it needs."""
        for weight, dtype in zip(self.network.parameters(), self.types, strict=True):
            weight.data = weight.data.to(self.device, dtype)
        if not self.opened:
            self.run.open()
            self.opened = True
        if (cache := self.run.training_step.cache) and cache.place == "gpu":
            cache.features = cache.features.to(self.device)
        if self.batches is None:
            self.begin()

    def rest(self) -> None:
        """Leave the GPU: weights wait in the host's memory as bfloat16, the optimizer's state is forgotten."""
        self.run.training_step.optimizer.zero_grad()
        self.run.training_step.optimizer.state.clear()
        if self.device == "cuda":
            for weight in self.network.parameters():
                weight.data = weight.data.to("cpu", torch.bfloat16)
            if (cache := self.run.training_step.cache) and cache.place == "gpu":
                cache.features = cache.features.cpu()
            free_models()  # and what a Trainer's circle of references holds

    def begin(self) -> None:
        """Open the loader, and step on the longest images, which tells the memory; the first step compiles."""
        run, began = self.run, time.perf_counter()
        run.config = replace(run.config, batch_size=self.batch_size)
        run.open_loader(pixels=not self.variant.cached)
        if self.variant.peer:
            run.loader = peer_loader(run)
        elif run.store and not run.workers:  # as from the second epoch on
            for sample in run.samples["train"]:
                run.store.patches(sample)
        samples = longest_images(run, self.batch_size)
        step = partial(self.trainer, samples, 1) if self.variant.peer == "trainer" else partial(self.step_on, samples)
        step()
        self.startup = time.perf_counter() - began
        self.peak = peak_memory(step, self.device)
        self.speed = measured_peak(torch.device(self.device), torch.bfloat16 if self.in_bf16 else torch.float32)
        self.batches = batches_of(self.run)

    def trainer(self, samples, steps: int) -> dict:
        return trainer_trial(self.run.model, samples, self.batch_size, steps, self.in_bf16, self.run.workers)

    def step_on(self, samples) -> None:
        self.step(to_device(self.run.loader.collate_fn(samples), self.device))

    def step(self, batch: Batch):
        return self.run.training_step([batch], self.weight)[0]

    def train(self) -> dict[str, float]:
        """Some steps, after one that allocates what stays: images, tokens, patches, seconds, those of waiting."""
        retries = alloc_retries(self.device)
        if self.variant.peer == "trainer":
            found = self.trainer(self.run.samples["train"], self.config.steps)
            return found | {"retries": alloc_retries(self.device) - retries}
        self.step(next(self.batches))
        batches, waited = [], 0.0

        def steps() -> None:
            nonlocal waited
            for _ in range(self.config.steps):
                waiting_since = time.perf_counter()
                batches.append(next(self.batches))
                waited += time.perf_counter() - waiting_since
                self.step(batches[-1])
            self.run.training_step.check()

        seconds = seconds_of(steps, self.device)
        return sizes_of(batches) | {
            "seconds": seconds, "waited": waited, "retries": alloc_retries(self.device) - retries,
        }  # fmt: skip


def batches_of(run: Run) -> Iterator[Batch]:
    """Of one epoch after the other."""
    epoch = 0
    while True:
        run.batches.shuffle(epoch)
        cache = run.training_step.cache
        yield from cache.ahead(run.loader) if cache else run.loader
        epoch += 1


def sizes_of(batches: list[Batch]) -> dict[str, int]:
    """Images, tokens, patches, and places in the sequences, padding included."""
    masks = [batch["attention_mask"] for batch in batches]
    return {
        "images": sum(map(len, masks)), "tokens": sum(int(mask.sum()) for mask in masks),
        "patches": sum(h * w for batch in batches for h, w in batch["image_sizes"]),
        "places": sum(mask.numel() for mask in masks),
    }  # fmt: skip


def longest_images(run: Run, number: int) -> list[Sample]:
    lengths = run.batches.lengths
    return [run.samples["train"][i] for i in sorted(range(len(lengths)), key=lambda i: lengths[i][2])[-number:]]


def peer_loader(run: Run) -> DataLoader:
    """The run's own batches as a plain loop feeds them."""
    return run.accelerator.prepare(DataLoader(
        run.loader.dataset, batch_sampler=run.batches, collate_fn=PlainCollate(run.model), num_workers=run.workers,
        pin_memory=torch.cuda.is_available(), persistent_workers=run.workers > 0,
    ))  # fmt: skip


def alloc_retries(device: str) -> int:
    """How often the allocator had to give back memory to find some."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device == "cuda" else 0


def row_of(trial: Trial) -> dict:
    """Medians over turns, see `throughput.measure_throughput`."""
    if not trial.found:
        return {"name": trial.variant.name, "out_of_memory": True}
    part = {key: np.array([turn[key] for turn in trial.found]) for key in trial.found[0]}
    cache = trial.run.training_step.cache
    flops = [step_flops(trial.network.config, *counts, encoder=not cache)
             for counts in zip(part["images"], part["tokens"], part["patches"], strict=True)]  # fmt: skip
    rates = part["images"] / part["seconds"]
    return {
        "name": trial.variant.name, "batch_size": trial.batch_size, "images_per_second": float(np.median(rates)),
        "peak_share": float(np.median(flops / part["seconds"]) / trial.speed), "peak_memory": trial.peak,
        "retries": int(part["retries"].sum()), "padding": float(1 - part["tokens"].sum() / part["places"].sum()),
        "waiting": float(np.median(part["waited"] / part["seconds"])) if "waited" in part else None,
        "startup": trial.startup, "rates": rates.tolist(), "validation_rates": trial.answered,
        "validation_per_second": float(np.median(trial.answered)) if trial.answered else None,
        "cache": cache and {"place": cache.place, "bytes": cache.features.nbytes},
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
