"""How many images a second `train` trains, and `evaluate` answers, and what each part of the fast step bought.

The first variant is a plain transformers loop; each further one adds one thing, the last are what `train`
does.  All train the same weights on the same images, by `TrainingStep`.

Left out: the cost of each heatmap (`overhead`), the clock and the table (`timing`).
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..data.fsc147 import Sample, open_split
from ..evaluation.answering import answering_batch_size, evaluate_samples
from ..model.adapt import add_lora, freeze_vision
from ..model.collate import Batch, to_device
from ..model.device import default_workers, make_accelerator
from ..model.heatmaps import Heatmap
from ..model.network import CountingModel
from ..model.pixels import PixelStore
from ..model.vision_cache import VisionCache
from ..options import Precision, need, need_report
from ..training.batches import training_loader
from ..training.losses import DualLoss
from ..training.step import TrainingStep, make_optimizer
from .overhead import WEIGHT, load_or_shape
from .plain_loop import PlainCollate, PlainLoss
from .timing import measured_peak, peak_memory, seconds_of, step_flops, table, take_turns, write_report


@dataclass(frozen=True)
class ThroughputConfig:
    """Measure how many of a root's images a second are trained and answered, and what each part of the step bought."""

    data: Path
    """Folder in FSC147's official layout."""
    model: str = "tiny"
    """"tiny", a folder, or qwen3-vl-2b, -4b, -8b: random weights at the true shapes, nothing to download."""
    batch_size: int = 8
    """Images of a step, at the most; a variant that has no room for them takes the half."""
    rounds: int = 20
    """Timed trials of each variant."""
    steps: int = 8
    """Steps of a trial."""
    limit: int | None = None
    """Only so many images of each split."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU, fp32 elsewhere."""
    vision_cache: Literal["auto", "gpu", "host", "disk"] = "auto"
    """Where a frozen encoder's outputs are kept; auto: the first with room."""
    validation: bool = True
    """Time validation as well."""
    gradient_checkpointing: bool = False
    """Less memory for more time."""
    lora: int | None = None
    """Train low-rank adapters of this rank."""
    workers: int | None = None
    """Processes that read images; None: up to 8 on a GPU, else 0."""
    json: Path | None = None
    """Write what was measured here, and the rows to the same name with .csv."""

    def __post_init__(self):
        for name in ("batch_size", "rounds", "steps"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need_report(self, "rows")


@dataclass(frozen=True)
class Variant:
    """One way to train; the switches are those of `TrainConfig`."""

    name: str
    plain: bool = False
    by_size: bool = True
    compiled: bool = False
    cached: bool = False


def variants_of(on_gpu: bool, frozen: bool) -> list[Variant]:
    """From a plain loop to what `train` does: compiled layers on a GPU, a cache if the encoder is frozen."""
    variants = [
        Variant("plain transformers loop", plain=True, by_size=False),
        Variant("layers called directly", by_size=False),
        Variant("+ batches by size"),
    ]
    if on_gpu:
        variants.append(Variant("+ compiled layers", compiled=True))
    if frozen:
        variants.append(Variant("+ vision cache", compiled=on_gpu, cached=True))
    return variants


@dataclass
class Setup:
    """What all variants share."""

    model: CountingModel
    samples: dict[str, list[Sample]]  # of "train" and "val"
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    store: PixelStore
    cache: VisionCache | None
    workers: int

    @property
    def device(self) -> str:
        return self.accelerator.device.type


class Runner:
    """A variant with its loader, which goes on from trial to trial; call `close` at the end."""

    def __init__(self, variant: Variant, setup: Setup, batch_size: int):
        self.variant, self.setup, self.batch_size = variant, setup, batch_size
        model, optimizer, cache = setup.model, setup.optimizer, setup.cache if variant.cached else None
        self.loader = training_loader(
            setup.samples["train"], model, None if cache else setup.store, batch_size, by_size=variant.by_size,
            workers=setup.workers,
        )  # fmt: skip
        loss = DualLoss(model.network, heatmap=Heatmap(model.network, compiled=variant.compiled))
        if variant.plain:
            loss, optimizer = PlainLoss(model.network), torch.optim.AdamW(model.network.parameters(), lr=1e-6)
            self.loader = DataLoader(
                self.loader.dataset, batch_sampler=self.loader.batch_sampler, collate_fn=PlainCollate(model),
                num_workers=setup.workers, pin_memory=self.loader.pin_memory, persistent_workers=setup.workers > 0,
            )  # fmt: skip
        self.training_step = TrainingStep(loss, optimizer, setup.accelerator, cache=cache)
        self.padding = self.loader.batch_sampler.padding()
        self.batches = self._forever()

    def _forever(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            self.loader.batch_sampler.shuffle(epoch)
            yield from self.loader
            epoch += 1

    def close(self) -> None:
        """End the worker processes."""
        self.batches.close()
        self.loader = None

    def fits(self) -> bool:
        """Whether a step on the longest images has room; keeps the memory at its peak, and leaves nothing behind."""
        lengths = self.loader.batch_sampler.lengths
        longest = sorted(range(len(lengths)), key=lambda i: lengths[i][2])[-self.batch_size :]
        batch = self.loader.collate_fn([self.loader.dataset[i, False] for i in longest])
        try:
            self.step(batch)  # the first step allocates what stays
            self.peak = peak_memory(partial(self.step, batch), self.setup.device)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            self.release()

    def step(self, batch: Batch) -> None:
        batch = to_device(batch, self.setup.accelerator.device)
        self.training_step([batch], 0 if self.variant.plain else WEIGHT)

    def trial(self, steps: int, _: int) -> dict[str, float]:
        """Some steps, after one that allocates what stays: images, tokens, patches, seconds, those of waiting."""
        self.step(next(self.batches))
        counts = {"images": 0, "tokens": 0, "patches": 0, "waited": 0.0}

        def run() -> None:
            for _ in range(steps):
                waiting_since = time.perf_counter()
                batch = next(self.batches)
                counts["waited"] += time.perf_counter() - waiting_since
                counts["images"] += len(batch["names"])
                counts["tokens"] += int(batch["attention_mask"].sum())
                counts["patches"] += sum(h * w for h, w in batch["image_sizes"])
                self.step(batch)
            self.training_step.check()

        counts["seconds"] = seconds_of(run, self.setup.device)
        self.release()
        return counts

    def release(self) -> None:
        """Give back the gradients' memory, and that of the plain loop's own optimizer."""
        self.setup.model.network.zero_grad()
        if self.variant.plain:
            self.training_step.optimizer.state.clear()
        if self.setup.device == "cuda":
            torch.cuda.empty_cache()


def open_runner(variant: Variant, setup: Setup, batch_size: int) -> Runner:
    """A variant at the batch size wanted, or at the half, the quarter ... that has room."""
    while True:
        runner = Runner(variant, setup, batch_size)
        if runner.fits():
            return runner
        runner.close()
        if batch_size == 1:
            raise ValueError(f"not even one image has room in a step of '{variant.name}'")
        batch_size //= 2


def measure_training(setup: Setup, config: ThroughputConfig) -> list[dict]:
    """Time all variants in turn; a row for each.

    Returns:
        Rows with `name`, `batch_size` (the largest that fits, up to the one wanted), `images_per_second`,
        `tokens_per_second`, `peak_share` (of a matrix product's speed), `peak_memory` (MiB, on the longest
        images), `padding` and `waiting` (shares of tokens and of time), `rates` (images a second of each trial),
        and `speedup` over the first variant: medians over trials.
    """
    variants = variants_of(setup.device == "cuda", setup.cache is not None)
    runners = {variant.name: open_runner(variant, setup, config.batch_size) for variant in variants}
    trials = {name: partial(runner.trial, config.steps) for name, runner in runners.items()}
    found = take_turns(trials, config.rounds, warmup=1)  # which compiles, and starts the workers
    dtype = torch.bfloat16 if setup.accelerator.mixed_precision == "bf16" else torch.float32
    speed = measured_peak(setup.accelerator.device, dtype)
    rows = []
    for name, part in found.items():
        runner = runners[name]
        runner.close()
        flops = [step_flops(setup.model.network.config, *counts, encoder=not runner.variant.cached)
                 for counts in zip(part["images"], part["tokens"], part["patches"], strict=True)]  # fmt: skip
        rates = part["images"] / part["seconds"]
        rows.append({
            "name": name, "batch_size": runner.batch_size,
            "images_per_second": float(np.median(rates)),
            "tokens_per_second": float(np.median(part["tokens"] / part["seconds"])),
            "peak_share": float(np.median(flops / part["seconds"]) / speed),
            "peak_memory": runner.peak, "padding": runner.padding,
            "waiting": float(np.median(part["waited"] / part["seconds"])),
            "rates": rates.tolist(),
        })  # fmt: skip
        rows[-1]["speedup"] = float(np.median(rates / rows[0]["rates"]))
    return rows


def measure_validation(setup: Setup, config: ThroughputConfig) -> list[dict]:
    """Images a second of validation: losses, maps, greedy answers; without the first pass: it compiles and decodes."""
    samples, heatmap = setup.samples["val"], Heatmap(setup.model.network, compiled=setup.device == "cuda")
    batch_size = answering_batch_size(config.batch_size, heatmap)

    def trial(cache: VisionCache | None, _: int) -> dict[str, float]:
        answer = partial(
            evaluate_samples, setup.model, samples, batch_size, heatmap, setup.accelerator, setup.workers, cache,
            setup.store,
        )  # fmt: skip
        return {"rate": len(samples) / seconds_of(answer, setup.device)}

    trials = {"validation, encoder in the loop": partial(trial, None)}
    if setup.cache is not None:
        trials["validation, vision cache"] = partial(trial, setup.cache)
    found = take_turns(trials, min(2, config.rounds), warmup=1)
    return [{"name": name, "images_per_second": float(np.median(part["rate"])), "rates": part["rate"].tolist()}
            for name, part in found.items()]  # fmt: skip


def fp32_share(runner: Runner, steps: int, narrow: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """What fp32 parameters and optimizer cost: a variant's steps against the same with all of it in a narrower type.

    The network is left in that type.

    Returns:
        Seconds of "float32" and "narrow", the best of two, and `share` of the former that the latter saves.
    """
    setup, seconds = runner.setup, {}
    batches = [to_device(next(runner.batches), setup.accelerator.device) for _ in range(steps)]
    for name in ("float32", "narrow"):
        if name == "narrow":
            runner.release()
            setup.model.network.to(narrow)
            setup.optimizer.state.clear()
            torch._dynamo.reset()  # torch before 2.12 goes on with kernels compiled for float32 (pytorch #177525)
        runs = [seconds_of(lambda: [runner.step(batch) for batch in batches], setup.device) for _ in range(3)]
        seconds[name] = min(runs[1:])  # the first warms up
    return {**seconds, "share": 1 - seconds["narrow"] / seconds["float32"]}


# --- The command


def make_setup(config: ThroughputConfig, folder: Path) -> Setup:
    """Load what the variants share, as `train` does."""
    set_seed(0)
    accelerator = make_accelerator(config.precision)
    samples = {split: open_split(config.data, split, config.limit) for split in ("train", "val")}
    model = load_or_shape(config.model, accelerator.device.type)
    network, workers = model.network, default_workers() if config.workers is None else config.workers
    if config.lora:
        add_lora(network, config.lora, narrow=accelerator.mixed_precision == "bf16")
    if config.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    frozen, train = not model.recipe.train_vision, samples["train"]
    freeze_vision(network.to(accelerator.device).train(), frozen)
    store = PixelStore([*train, *samples["val"]], model.image_processor, shared=workers > 0)
    if not workers:  # as from the second epoch on
        for sample in train:
            store.patches(sample)
    everything, cache = [*train, *(sample.flipped() for sample in train), *samples["val"]], None
    if frozen:
        compiled = accelerator.device.type == "cuda"
        cache = VisionCache(model, everything, accelerator, config.vision_cache, folder, workers, compiled=compiled)
    return Setup(model, samples, accelerator, make_optimizer(network, 1e-6), store, cache, workers)


def measure_throughput(config: ThroughputConfig) -> dict:
    """Measure, print each part as it is known, and write the file; `python -m fsc147lib throughput` calls this.

    Returns:
        `rows` (`measure_training`), `validation` (`measure_validation`), `cache` (None without one),
        `fp32_parameters` (`fp32_share`; None where training is not in bfloat16).
    """

    def tell(text: str) -> None:
        print(text, flush=True)
        if config.json is not None:
            write_report(config.json, report, config)

    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(config, Path(folder))
        cache = setup.cache and {"place": setup.cache.place, "images": len(setup.cache.places),
                                 "bytes": setup.cache.features.nbytes}  # fmt: skip
        rows = measure_training(setup, config)
        report = {"rows": rows, "validation": [], "cache": cache, "fp32_parameters": None}
        tell(table(rows))
        if config.validation:
            report["validation"] = measure_validation(setup, config)
            tell(table(report["validation"]))
        if setup.accelerator.mixed_precision == "bf16" and not config.lora:
            last = variants_of(setup.device == "cuda", setup.cache is not None)[-1]
            runner = open_runner(last, setup, config.batch_size)
            report["fp32_parameters"] = fp32_share(runner, config.steps)
            runner.close()
            share = report["fp32_parameters"]["share"]
            tell(f"fp32 parameters and optimizer take {share:.1%} of the last variant's step")
    return report
