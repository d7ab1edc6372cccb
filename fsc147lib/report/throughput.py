"""Images per second of training: a plain transformers loop, `Trainer`, and `train` with one part more each time.

Each variant runs in a process of its own, one after the other, so that none shares GPU or cores with another.
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
from ..model.network import CountingModel
from ..options import need, need_report
from ..training.batches import make_loader
from ..training.loop import open_run
from ..training.losses import LossParts
from ..training.memory import heaviest_parts, peak_memory, wait_for
from ..training.setup import Run, TrainConfig
from .shapes import load_or_shape
from .timing import seconds_of, table, write_report

PEERS = PLAIN, TRAINER, TUNED = "plain transformers loop", "transformers.Trainer", "transformers.Trainer, tuned"


@dataclass(frozen=True)
class ThroughputConfig(TrainConfig):
    """Measure images per second of training with the options of `train`, beside a plain loop and `Trainer`.

    `model` may be qwen3-vl-2b, -4b or -8b: random weights at the true shapes, nothing to download.
    """

    PRESETS: ClassVar[dict[str, dict]] = {}
    """None: those of `train` say how long it trains."""
    batch_sizes: tuple[int, ...] = (16, 32, 64)
    """Batch sizes to try; a variant's row is that of its fastest."""
    rounds: int = 3
    """Timed turns of each variant."""
    steps: int = 8
    """Steps of a turn."""
    only: str | None = None
    """Measure the variants whose name contains this text."""
    json: Path | None = None
    """Write the rows here after each variant, and to the same name with .csv."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rounds", "steps"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "batch_sizes", bool(self.batch_sizes) and min(self.batch_sizes) >= 1, "numbers from 1")
        need_report(self, "rows")


def variants_of(config: ThroughputConfig, on_gpu: bool, frozen: bool) -> dict[str, ThroughputConfig]:
    """Options of each variant, by name: the peers, which train the count loss alone, then those of this library.

    A GPU adds compiled layers; a frozen vision encoder adds kept image features.
    """
    plain = replace(config, batch_by_size=False, compile=False, vision_cache="off")
    variants = {name: replace(plain, attention_weight=0) for name in PEERS}
    variants |= {"this library": plain, "+ batches by size": replace(plain, batch_by_size=True)}
    if on_gpu:
        variants["+ compiled layers"] = replace(config, compile=True, vision_cache="off")
    if frozen and config.vision_cache != "off":
        variants["+ kept image features"] = replace(config, compile=on_gpu)
    return {name: variant for name, variant in variants.items() if (config.only or "") in name}


def measure_throughput(config: ThroughputConfig) -> dict:
    """Measure each variant, print the table, and write the report; `fsc147lib throughput` calls this.

    Returns:
        A report whose `rows` have, for each variant, `name`, `batch_size`, `images_per_second` (median over turns),
        `rates` (of each turn), `over_best_peer` (ratio to the fastest peer), `peak_memory` (MiB); variants of this
        library also `waiting` (for batches, share of the time) and `validation_per_second`.  A
        variant that fails has `out_of_memory`, or `failed` with the error.
    """
    on_gpu, frozen = torch.cuda.is_available(), not load_or_shape(config.model, "meta").recipe.train_vision
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config, out=Path(folder) / "run", epochs=2, tracking="disabled", resume=False, overwrite=True)
        variants = variants_of(run, on_gpu, frozen)
        need(config, "only", bool(variants), "part of the name of a variant")
        for name, variant in variants.items():
            tried = [in_own_process(name, replace(variant, batch_size=size)) for size in config.batch_sizes]
            print(name, [row.get("rates", row) for row in tried], flush=True)
            rows.append(max(tried, key=lambda row: row.get("images_per_second", 0)))
            compare_to_peers(rows)
            if config.json is not None:
                write_report(config.json, {"rows": rows}, config)
    print("\n" + table(rows))
    return {"rows": rows}


def in_own_process(name: str, config: ThroughputConfig) -> dict:
    """The row of `measure`, run in a new process; a row with `out_of_memory` or `failed` if that ends in an error."""
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    start_readers = partial(multiprocessing.set_start_method, multiprocessing.get_start_method(), force=True)
    with ProcessPoolExecutor(1, spawn, start_readers) as process:  # spawned readers would each import torch
        try:
            return process.submit(measure, name, config).result()
        except torch.OutOfMemoryError:
            return {"name": name, "batch_size": config.batch_size, "out_of_memory": True}
        except Exception as error:  # also that the process was killed
            return {"name": name, "batch_size": config.batch_size, "failed": f"{type(error).__name__}: {error}"}


def compare_to_peers(rows: list[dict]) -> None:
    """Add `over_best_peer` to rows that have a speed: its ratio to the fastest peer's; None without a peer."""
    speeds = {row["name"]: row["images_per_second"] for row in rows if "rates" in row}
    best = max((speeds[name] for name in PEERS if name in speeds), default=None)
    for row in rows:
        if "rates" in row:
            row["over_best_peer"] = row["images_per_second"] / best if best else None


def measure(name: str, config: ThroughputConfig) -> dict:
    """A variant's row of `measure_throughput`, without `over_best_peer`; OutOfMemoryError if the batch has no room."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(config, model=load_or_shape(config.model, device))
    row = {"name": name, "batch_size": config.batch_size}
    if name in (TRAINER, TUNED):
        return row | time_trainer(run, config, name == TUNED)
    collate, step = run.collate, partial(run.training_step, weight=config.attention_weight)
    if name == PLAIN:
        collate = PlainCollate(run.model)
        run.model.network.set_attn_implementation("sdpa")
        run.training_step.loss = PlainLoss(run.model.network).to(device)
        readers = make_loader(run.samples["train"], run.batches, collate, run.workers)
        run.loader = run.accelerator.prepare(readers)
    open_run(run)
    run.model.network.train()
    heaviest = [to_device(collate(part), device) for part in heaviest_parts(run, config.batch_size)]
    step(heaviest)  # so that later steps find their memory reserved
    row["peak_memory"] = peak_memory(partial(step, heaviest), device)
    windows, turns = chain.from_iterable(map(run.windows, count())), []  # one epoch after the other
    for _ in range(1 + config.rounds):  # the first turn is not counted
        wait_for(device)
        images, waited, started = 0, 0.0, time.perf_counter()
        for _ in range(config.steps):
            asked = time.perf_counter()
            window = next(windows)
            waited += time.perf_counter() - asked
            images += sum(len(batch["names"]) for batch in window)
            step(window)
        run.training_step.check()  # waits for the GPU
        seconds = time.perf_counter() - started
        turns.append((images / seconds, waited / seconds))
    rates, waits = np.array(turns[1:]).T
    row |= {"images_per_second": float(np.median(rates)), "rates": rates.tolist(), "waiting": float(np.median(waits))}
    if name in ("+ compiled layers", "+ kept image features"):
        run.validate()  # the first one decodes each image
        row["validation_per_second"] = len(run.samples["val"]) / seconds_of(run.validate, device)
    return row


# --- The peers

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")


class PlainCollate:
    """The batch of a plain loop: inputs of transformers, with pixels that the processor makes anew each time."""

    def __init__(self, model: CountingModel):
        self.collate = Collate(model.tokenizer, model.image_processor, pixels=False)

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels = self.collate.image_processor(images=[sample.image for sample in samples], return_tensors="pt")
        batch = {**self.collate(samples), **pixels}
        return {key: batch[key] for key in (*INPUTS, "names", "count", "image_keys", "answer_tokens", "target")}


class PlainLoss(nn.Module):
    """The count loss as transformers computes it: a pass with the logits of all tokens."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, weight, tokens=None, images=None) -> LossParts:
        loss = self.network(**{key: batch[key] for key in INPUTS}, use_cache=False).loss
        return LossParts(loss, loss, torch.zeros_like(loss))


class TimedTrainer(Trainer):
    """transformers' `Trainer` that appends the time at which each step begins to `begins`."""

    def training_step(self, network, inputs, *args, **kwargs):
        wait_for(self.args.device.type)
        self.begins.append(time.perf_counter())
        return super().training_step(network, {key: inputs[key] for key in INPUTS}, *args, **kwargs)


def time_trainer(run: Run, config: ThroughputConfig, tuned: bool) -> dict:
    """Time `Trainer` as Qwen's fine-tuning calls it, in bf16.

    A tuned one compiles, and gets batches of images of like size.
    Returns `images_per_second`, `rates` and `peak_memory` of `measure_throughput`'s row.
    """
    on_gpu, network, bf16 = torch.cuda.is_available(), run.model.network, run.compute.precision == "bf16"
    network.set_attn_implementation("sdpa")
    if bf16 and not config.lora:
        network.to(torch.bfloat16)
    steps = 3 + config.steps * config.rounds
    run.batches.by_size = tuned
    epochs = (run.batches.epoch(epoch) for epoch in count())
    shown = chain.from_iterable(batch for epoch in epochs for step in epoch for batch in step)
    samples = [run.samples["train"][image] for image, _ in islice(shown, (steps + 1) * config.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=config.batch_size, max_steps=steps, learning_rate=1e-6,
            bf16=bf16, use_cpu=not on_gpu, dataloader_num_workers=run.workers,
            remove_unused_columns=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, torch_compile=tuned and on_gpu, optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = TimedTrainer(network, arguments, PlainCollate(run.model), samples)
        trainer.begins = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    begins = np.array(trainer.begins[2:])[:: config.steps]  # the first two steps are not counted
    rates = (config.steps * config.batch_size / np.diff(begins)).tolist()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {"images_per_second": float(np.median(rates)), "rates": rates, "peak_memory": peak}
