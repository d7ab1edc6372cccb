"""Images a second of training: what one would use otherwise, and what each part of `train` adds.

Each variant runs in a process of its own, one after the other, so none shares the GPU's memory or a core with another.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..data import Sample
from ..model.collate import Batch, Collate, to_device
from ..model.device import peak_memory, seconds_of, wait_for
from ..model.network import CountingModel
from ..options import need, need_report
from ..training.batches import make_loader
from ..training.loop import open_run
from ..training.losses import LossParts
from ..training.memory import heaviest_parts
from ..training.setup import Run, TrainConfig
from .shapes import load_or_shape
from .timing import table, write_report


@dataclass(frozen=True)
class ThroughputConfig(TrainConfig):
    """Measure how many images a second `train` trains and answers with its options, beside a plain loop and Trainer.

    `model` may be qwen3-vl-2b, -4b or -8b: random weights at the true shapes, nothing to download.  Each step looks at
    the heatmap.
    """

    PRESETS: ClassVar[dict[str, dict]] = {}
    """None: those of `train` say how long it trains."""
    batch_sizes: tuple[int, ...] = (16, 32, 64)
    """Batches that are tried; a row is that of the fastest."""
    rounds: int = 3
    """Timed turns of each variant."""
    steps: int = 8
    """Steps of a turn."""
    only: str | None = None
    """Only variants with this in their name."""
    json: Path | None = None
    """Write what was measured here, as it becomes known, and the rows to the same name with .csv."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rounds", "steps"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "batch_sizes", bool(self.batch_sizes) and min(self.batch_sizes) >= 1, "numbers from 1")
        need_report(self, "rows")


PLAIN, TRAINER, TUNED = "plain transformers loop", "transformers.Trainer", "transformers.Trainer, tuned"


def variants_of(config: ThroughputConfig, on_gpu: bool, frozen: bool) -> dict[str, ThroughputConfig]:
    """Peers (the count loss alone), then `train` with one part more each time."""
    plain = replace(config, batch_by_size=False, compile=False, vision_cache="off")
    variants = {name: replace(plain, attention_weight=0) for name in (PLAIN, TRAINER, TUNED)}
    variants |= {"this library": plain, "+ batches by size": replace(plain, batch_by_size=True)}
    if on_gpu:
        variants["+ compiled layers"] = replace(config, compile=True, vision_cache="off")
    if frozen and config.vision_cache != "off":
        variants["+ kept image features"] = replace(config, compile=on_gpu)
    return {name: variant for name, variant in variants.items() if (config.only or "") in name}


def measure_throughput(config: ThroughputConfig) -> dict:
    """Measure, print and write each row as it is known; `fsc147lib throughput` calls this.

    Returns:
        `rows`, one for each variant: `name`, `batch_size`, `images_per_second` (median of turns), `rates` (of each),
        `over_best_peer`, `peak_memory` (MiB), `retries` (of the allocator), `waiting` (share of the time), `startup`
        (seconds of the first step), `validation_per_second`; or `out_of_memory`, or `failed` with the error.
    """
    on_gpu, frozen = torch.cuda.is_available(), not load_or_shape(config.model, "meta").recipe.train_vision
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config, out=Path(folder) / "run", epochs=2, tracking="disabled", resume=False, overwrite=True)
        variants = variants_of(run, on_gpu, frozen)
        need(config, "only", bool(variants), "part of the name of a variant")
        for name, variant in variants.items():
            tried = [in_own_process(name, replace(variant, batch_size=size)) for size in config.batch_sizes]
            rows[name] = max(tried, key=lambda row: row.get("images_per_second", 0))
            report = {"rows": compare(list(rows.values()))}
            if config.json is not None:
                write_report(config.json, report, config)
            print(name, [row.get("rates", row) for row in tried], flush=True)
    print("\n" + table(report["rows"]))
    return report


def in_own_process(name: str, config: ThroughputConfig) -> dict:
    """`measure`, in a process that ends with it."""
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    with ProcessPoolExecutor(1, spawn, load_by, (multiprocessing.get_start_method(),)) as process:
        try:
            return process.submit(measure, name, config).result()
        except torch.OutOfMemoryError:
            return {"name": name, "batch_size": config.batch_size, "out_of_memory": True}
        except Exception as error:  # also of a process that is gone
            return {"name": name, "batch_size": config.batch_size, "failed": f"{type(error).__name__}: {error}"}


def load_by(method: str) -> None:
    """Let the process start readers as its parent would; spawned ones would import torch one after the other."""
    multiprocessing.set_start_method(method, force=True)


def compare(rows: list[dict]) -> list[dict]:
    """The rows with `over_best_peer`, the ratio of medians to the fastest peer."""
    peers = [row["images_per_second"] for row in rows if row["name"] in (PLAIN, TRAINER, TUNED) and "rates" in row]
    for row in rows:
        row["over_best_peer"] = row["images_per_second"] / max(peers) if peers and "rates" in row else None
    return rows


def measure(name: str, config: ThroughputConfig) -> dict:
    """A row of `measure_throughput`; OutOfMemoryError where the batch has no room."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(config, model=load_or_shape(config.model, device))
    if name in (TRAINER, TUNED):
        return {"name": name, "batch_size": config.batch_size, **time_trainer(run, config, name == TUNED)}
    if name == PLAIN:
        run.model.network.set_attn_implementation("sdpa")
        run.training_step.loss = PlainLoss(run.model.network).to(device)
        readers = make_loader(run.samples["train"], run.batches, PlainCollate(run.model), run.workers)
        run.loader = run.accelerator.prepare(readers)
    open_run(run)
    run.model.network.train()
    collate = PlainCollate(run.model) if name == PLAIN else run.collate
    heaviest = [to_device(collate(part), device) for part in heaviest_parts(run, config.batch_size)]
    reserve = partial(run.training_step, heaviest, config.attention_weight)  # the memory that all others then find
    startup, peak = seconds_of(reserve, device), peak_memory(reserve, device)
    windows = chain.from_iterable(map(run.windows, count()))  # one epoch after the other
    retries, turns = -alloc_retries(), [time_steps(run, windows, device) for _ in range(1 + config.rounds)][1:]
    rates = [turn["images"] / turn["seconds"] for turn in turns]
    row = {
        "name": name, "batch_size": config.batch_size, "images_per_second": float(np.median(rates)), "rates": rates,
        "waiting": float(np.median([turn["waited"] / turn["seconds"] for turn in turns])), "startup": startup,
        "peak_memory": peak, "retries": retries + alloc_retries(),
    }  # fmt: skip
    if name.startswith("+ ") and "size" not in name:
        run.validate()  # the first touches each image for the first time
        row["validation_per_second"] = len(run.samples["val"]) / seconds_of(run.validate, device)
    return row


def time_steps(run: Run, windows, device: str) -> dict[str, float]:
    """Images, seconds, and seconds of waiting for batches, of some steps."""
    images, waited = 0, 0.0

    def steps() -> None:
        nonlocal images, waited
        for _ in range(run.config.steps):
            began = time.perf_counter()
            window = next(windows)
            waited += time.perf_counter() - began
            images += sum(len(batch["names"]) for batch in window)
            run.training_step(window, run.config.attention_weight)
        run.training_step.check()

    return {"seconds": seconds_of(steps, device), "images": images, "waited": waited}


def alloc_retries() -> int:
    """How often the allocator had to give back memory to find some."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0


# --- What one would use otherwise

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")


class PlainCollate:
    """What a plain loop feeds to transformers: pixels from the library's processor, anew for each batch."""

    def __init__(self, model: CountingModel):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        batch = {**self.collate(samples), **pixels}
        return {key: batch[key] for key in (*INPUTS, "names", "count", "image_keys", "answer_tokens", "target")}


class PlainLoss(nn.Module):
    """The count loss as transformers computes it: a pass with all logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, weight, tokens=None, images=None) -> LossParts:
        loss = self.network(**{key: batch[key] for key in INPUTS}, use_cache=False).loss
        return LossParts(loss, loss, torch.zeros_like(loss))


class TimedTrainer(Trainer):
    """transformers' `Trainer`, which notes when each step begins; it looks at the loss after each, so it waits."""

    def training_step(self, network, inputs, *args, **kwargs):
        wait_for(self.args.device.type)
        self.begins.append(time.perf_counter())
        return super().training_step(network, {key: inputs[key] for key in INPUTS}, *args, **kwargs)


def time_trainer(run: Run, config: ThroughputConfig, tuned: bool) -> dict:
    """`Trainer` as Qwen's fine-tuning calls it, in bf16; tuned, it compiles and is given batches of like size."""
    on_gpu, network = torch.cuda.is_available(), run.model.network
    network.set_attn_implementation("sdpa")
    if run.compute.precision == "bf16" and not config.lora:
        network.to(torch.bfloat16)
    steps = 3 + config.steps * config.rounds
    run.batches.by_size = tuned
    epochs = (run.batches.epoch(epoch) for epoch in count())
    shown = chain.from_iterable(batch for epoch in epochs for step in epoch for batch in step)
    samples = [run.samples["train"][image] for image, _ in islice(shown, (steps + 1) * config.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=config.batch_size, max_steps=steps, learning_rate=1e-6,
            bf16=run.compute.precision == "bf16", use_cpu=not on_gpu, dataloader_num_workers=run.workers,
            remove_unused_columns=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, torch_compile=tuned and on_gpu, optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = TimedTrainer(network, arguments, PlainCollate(run.model), samples)
        trainer.begins = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    begins = np.array(trainer.begins[2:])[:: config.steps]
    rates = (config.steps * config.batch_size / np.diff(begins)).tolist()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {"images_per_second": float(np.median(rates)), "rates": rates, "peak_memory": peak}
