"""A variant of training in a process of its own: it trains for some steps when asked to, and gives the GPU back.

Variants beside each other in one process press on one another's memory: on an 80 GB card that costs a third of the
speed.  Between two turns a process keeps its compiled layers and its images, and leaves the GPU to the others.

Left out: which turns there are, and what is made of their numbers (`throughput`).
"""

import multiprocessing
import time
from dataclasses import replace
from functools import cache, partial
from itertools import chain, count
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..model.collate import Batch, to_device
from ..model.device import free_models, peak_memory, seconds_of
from ..training.batches import make_loader
from ..training.loop import Run, TrainConfig
from ..training.losses import LossParts
from ..training.memory import in_parts
from .peers import PlainCollate, PlainLoss, trainer_steps
from .shapes import load_or_shape


class Variant(NamedTuple):
    """One way to train: by `train`'s options and, where it is named, by a peer."""

    name: str
    config: TrainConfig  # a `ThroughputConfig`
    peer: Literal["loop", "trainer"] | None = None
    answers: bool = False  # validation is timed as well


class Trial:
    """A variant as a run, which trains, answers and rests as its parent asks."""

    def __init__(self, variant: Variant):
        self.variant, self.device = variant, "cuda" if torch.cuda.is_available() else "cpu"
        config = replace(variant.config, out=variant.config.out / variant.name)
        self.run = run = Run(config, model=load_or_shape(config.model, self.device))
        self.network, self.step, self.batch_size = run.model.network, run.training_step, config.batch_size
        self.in_bf16 = run.compute.precision == "bf16"
        if variant.peer:
            self.network.set_attn_implementation("sdpa")  # a peer runs as it comes
            self.step.loss = PlainLoss(self.network)
        self.network.train()
        if variant.peer == "trainer" and self.in_bf16 and not config.lora:  # as Qwen's own fine-tuning has them
            self.network.to(torch.bfloat16)
        self.types = [weight.dtype for weight in self.network.parameters()]
        self.opened, self.windows = False, None
        self.turns: list[dict[str, float]] = []
        self.answered: list[float] = []  # images a second
        self.rest()

    def turn(self) -> dict:
        """Train for some steps; a batch that has no room becomes the half, which begins anew.  The row so far."""
        while self.batch_size:
            try:
                self.wake()
                if not self.turns:
                    self.train()  # not counted: most sizes of images are new to it
                before = alloc_retries()
                found = self.train()
                self.turns.append(found | {"retries": alloc_retries() - before})
                if self.device == "cuda":  # not all of the longest images may be the most
                    self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**20)
                break
            except torch.cuda.OutOfMemoryError:
                self.windows, self.turns = None, []
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
        found = [float(self.train_on(next(self.windows)).count) for _ in range(self.variant.config.curves)]
        return {"name": self.variant.name, "batch_size": self.batch_size, "losses": found}

    def wake(self) -> None:
        """Have the GPU: fetch the weights, and before the first step of a batch's size all that it needs."""
        for weight, dtype in zip(self.network.parameters(), self.types, strict=True):
            weight.data = weight.data.to(self.device, dtype)
        if not self.opened:
            self.run.open()
            self.opened = True
        if self.step.cache and self.step.cache.place == "gpu":
            self.step.cache.features = self.step.cache.features.to(self.device)
        if self.windows is None:
            self.begin()

    def rest(self) -> None:
        """Leave the GPU: weights wait in the host's memory as bfloat16, the optimizer's state is forgotten."""
        self.step.optimizer.zero_grad()
        self.step.optimizer.state.clear()
        if self.device == "cuda":
            for weight in self.network.parameters():
                weight.data = weight.data.to("cpu", torch.bfloat16)
            if self.step.cache and self.step.cache.place == "gpu":
                self.step.cache.features = self.step.cache.features.cpu()
            free_models()  # and what a Trainer's circle of references holds

    def begin(self) -> None:
        """Open the loader; step on the longest images, for which there must be memory, and on all kinds of length."""
        run, began = self.run, time.perf_counter()
        run.config = replace(run.config, batch_size=self.batch_size)
        run.open_loader(pixels=not run.config.caches_vision)
        if self.variant.peer:
            loader = make_loader(run.samples["train"], run.batches, PlainCollate(run.model), run.workers)
            run.loader = run.accelerator.prepare(loader)
        elif run.store and not run.workers:  # as from the second epoch on
            for sample in run.samples["train"]:
                run.store.patches(sample)
        kinds = [images[-self.batch_size :] for images in longest_of_each_kind(run)]
        if self.variant.peer == "trainer":
            step = partial(self.trainer, [run.samples["train"][i] for i in kinds[-1]], 1)
        else:
            step = self.reserve = partial(self.train_on, window_of(run, kinds[-1]))
            for images in kinds[:-1]:
                self.train_on(window_of(run, images))
        step()
        self.startup = time.perf_counter() - began
        self.peak = peak_memory(step, self.device)
        self.speed = measured_speed(self.device, torch.bfloat16 if self.in_bf16 else torch.float32)
        self.windows = chain.from_iterable(map(run.windows, count()))  # one epoch after the other

    def trainer(self, samples, steps: int) -> tuple[list[Batch], float]:
        return trainer_steps(self.run.model, samples, self.batch_size, steps, self.in_bf16, self.run.workers)

    def train_on(self, window: list[Batch]) -> LossParts:
        return self.step(window, self.run.config.attention_weight)[0]

    def train(self) -> dict[str, float]:
        """Some steps: what they saw, their seconds, and those of waiting; before, untimed, on the longest images."""
        if self.variant.peer == "trainer":
            batches, seconds = self.trainer(self.run.samples["train"], self.variant.config.steps)
            return sizes_of(batches) | {"seconds": seconds}
        self.reserve()  # the memory that all others then find, as in the middle of a run
        found, waited = [], 0.0

        def steps() -> None:
            nonlocal waited
            for _ in range(self.variant.config.steps):
                began = time.perf_counter()
                window = next(self.windows)
                waited += time.perf_counter() - began
                # no more of them: the images or features of all steps take gigabytes
                found.extend({key: batch[key] for key in ("attention_mask", "image_sizes")} for batch in window)
                self.train_on(window)
            self.step.check()

        seconds = seconds_of(steps, self.device)
        return sizes_of(found) | {"seconds": seconds, "waited": waited}


def longest_of_each_kind(run: Run) -> list[list[int]]:
    """Training images in order of length up to the longest of a kind: torch compiles a layer for lengths that are
    multiples of 8, and one for others.  The last list holds all."""
    lengths = np.array([tokens for *_, tokens in run.batches.lengths])
    order = np.argsort(lengths)
    ends = {bool(length % 8): end for end, length in enumerate(lengths[order], 1)}
    return [order[:end].tolist() for end in sorted(ends.values())]


def window_of(run: Run, images: list[int]) -> list[Batch]:
    """One step's batches of some training images."""
    return [to_device(run.loader.collate_fn(part), run.compute.device) for part in in_parts(run, images)]


trial_of = cache(Trial)
"""The one trial of this process."""


def load_by(method: str) -> None:
    """Start the processes that read images as this one's parent would: spawned, as this one was itself, each of
    them imports torch before the next begins, which takes a minute and more for eight."""
    multiprocessing.set_start_method(method, force=True)


def row_of(trial: Trial) -> dict:
    """Medians over turns, see `throughput.measure_throughput`."""
    if not trial.turns:
        return {"name": trial.variant.name, "out_of_memory": True}
    part = {key: np.array([turn[key] for turn in trial.turns]) for key in trial.turns[0]}
    rates, cache = part["images"] / part["seconds"], trial.step.cache
    flops = [step_flops(trial.network.config, turn, encoder=not cache) for turn in trial.turns]
    return {
        "name": trial.variant.name, "batch_size": trial.batch_size, "images_per_second": float(np.median(rates)),
        "peak_share": float(np.median(flops / part["seconds"]) / trial.speed), "peak_memory": trial.peak,
        "retries": int(part["retries"].sum()), "padding": float(1 - part["tokens"].sum() / part["places"].sum()),
        "waiting": float(np.median(part["waited"] / part["seconds"])) if "waited" in part else None,
        "startup": trial.startup, "rates": rates.tolist(), "validation_rates": trial.answered,
        "validation_per_second": float(np.median(trial.answered)) if trial.answered else None,
        "cache": cache and {"place": cache.place, "bytes": cache.features.nbytes},
    }  # fmt: skip


def sizes_of(batches: list[Batch]) -> dict[str, int]:
    """Images, tokens, patches, and places in the sequences, padding included."""
    masks = [batch["attention_mask"] for batch in batches]
    return {
        "images": sum(map(len, masks)), "tokens": sum(int(mask.sum()) for mask in masks),
        "patches": sum(h * w for batch in batches for h, w in batch["image_sizes"]),
        "places": sum(mask.numel() for mask in masks),
    }  # fmt: skip


def step_flops(config, sizes: dict[str, int], encoder: bool) -> float:
    """Multiplications and additions that training on batches of `sizes_of` needs; the language model trains.

    Linear layers: 2 a weight and position forward, 4 backward; causal attention: half of all pairs; of the
    last layer the keys and values at all positions, the rest and the output head at 7 an image; the vision
    encoder (a frozen one) forward only.
    """
    text, vision = config.text_config, config.vision_config
    images, tokens, patches = sizes["images"], sizes["tokens"], sizes["patches"]
    width, inner = text.hidden_size, text.num_attention_heads * text.head_dim
    grouped = text.num_key_value_heads * text.head_dim
    layer = width * (2 * inner + 2 * grouped + 3 * text.intermediate_size)
    flops = 6 * tokens * ((text.num_hidden_layers - 1) * (layer + inner * tokens / images) + 2 * grouped * width)
    flops += 6 * 7 * images * (layer + text.vocab_size * width)
    if encoder:
        block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        flops += 2 * vision.depth * patches * (block + 2 * vision.hidden_size * patches / images)
    return flops


def measured_speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product of random numbers: median of five."""
    n = 8192 if device == "cuda" else 512  # a CPU without bfloat16 takes minutes for more
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(7)]
    return 2 * n**3 / float(np.median(seconds[2:]))


def alloc_retries() -> int:
    """How often the allocator had to give back memory to find some."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0
