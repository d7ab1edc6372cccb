"""How many images a second `train` trains, and `evaluate` answers, and what each part of the fast step bought.

The first variants are what one would use otherwise, a plain transformers loop and transformers' `Trainer`; each further
one adds one thing, up to what `train` does.  Each has a process of its own, and they take turns.

Left out: what a variant does in its process (`trials`), the cost of each heatmap (`overhead`), the table (`timing`).
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..options import need, need_report
from ..training.loop import TrainConfig
from .shapes import load_or_shape
from .timing import table, write_report
from .trials import Variant, load_by, trial_of


@dataclass(frozen=True)
class ThroughputConfig(TrainConfig):
    """Measure how many images a second `train` trains and answers with its options, and what each part bought.

    `model` may be qwen3-vl-2b, -4b or -8b: random weights at the true shapes, nothing to download.  `batch_size` is the
    largest that is tried: a variant that has no room for it takes the half.  Each step looks at the heatmap.
    """

    PRESETS: ClassVar[dict[str, dict]] = {}
    """None: those of `train` say how long it trains."""
    rounds: int = 5
    """Turns of each variant that count; the one before them meets most sizes of images for the first time."""
    steps: int = 8
    """Steps of a turn."""
    validation: bool = True
    """Time validation as well."""
    only: str | None = None
    """Only variants with this in their name."""
    curves: int | None = None
    """Instead of timing: count losses of so many steps from one start, in bf16 (this library and plain) and in fp32."""
    json: Path | None = None
    """Write what was measured here, as it becomes known, and the rows to the same name with .csv."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rounds", "steps"):
            need(self, name, getattr(self, name) >= 1, "at least 1")
        need(self, "curves", self.curves is None or self.curves >= 1, "at least 1")
        need_report(self, "rows")


def variants_of(config: ThroughputConfig, on_gpu: bool, frozen: bool) -> list[Variant]:
    """From peers to what `train` does: compiled layers on a GPU, a cache if the encoder is frozen."""
    plain = replace(config, batch_by_size=False, compile=False, vision_cache="off")
    count, by_size = replace(plain, attention_weight=0), replace(plain, batch_by_size=True)
    best, cached = (replace(by_size, compile=on_gpu, vision_cache=place) for place in ("off", config.vision_cache))
    variants = [
        Variant("plain transformers loop", count, peer="loop"),
        Variant("transformers.Trainer", count, peer="trainer"),
        Variant("layers called directly", plain),
        Variant("+ batches by size", by_size, answers=not on_gpu),
    ]
    variants += [Variant("+ compiled layers", best, answers=True)] * on_gpu
    return variants + [Variant("+ vision cache", cached, answers=True)] * (frozen and config.vision_cache != "off")


def curves_of(config: ThroughputConfig, on_gpu: bool) -> list[Variant]:
    """The three precisions whose losses are held against each other."""
    config = replace(config, attention_weight=0, compile=on_gpu, vision_cache="off")
    narrow = replace(config, precision="bf16")
    return [
        Variant("this library, bf16", narrow),
        Variant("plain transformers, bf16 autocast", narrow, peer="loop"),
        Variant("this library, fp32", replace(config, precision="fp32")),
    ]


def do(job: str, variant: Variant) -> dict | None:
    """In a variant's process: what a method of its `Trial` returns."""
    return getattr(trial_of(variant), job)()


def ask(process: ProcessPoolExecutor, job: str, variant: Variant) -> dict:
    """The row that a job of a variant returns, or one with `failed`."""
    try:
        return process.submit(do, job, variant).result()
    except Exception as error:  # also of a process that is gone
        return {"name": variant.name, "failed": f"{type(error).__name__}: {error}"}


def compare(rows: list[dict]) -> list[dict]:
    """The rows with `speedup` over the first one and `over_trainer`, medians of ratios within a turn, and `spread`,
    the largest distance of two turns beside their median, where it is over 10 %."""
    by_name = {row["name"]: row for row in rows if "rates" in row}
    for row in by_name.values():
        rates = np.array(row["rates"])
        spread = float((rates.max() - rates.min()) / np.median(rates))
        row["spread"] = spread if spread > 0.1 else None
        for key, peer in (("speedup", "plain transformers loop"), ("over_trainer", "transformers.Trainer")):
            base = np.array(by_name.get(peer, {}).get("rates", []))
            shared = min(len(rates), len(base))  # the last turns, where an earlier one had a larger batch
            row[key] = float(np.median(rates[-shared:] / base[-shared:])) if shared else None
    return rows


def measure_throughput(config: ThroughputConfig) -> dict:
    """Measure, print and write each row as it is known; `python -m fsc147lib throughput` calls this.

    Returns:
        `rows`, one for each variant: `name`, `batch_size` (the largest that fits, up to the one wanted),
        `images_per_second`, `peak_share` (of a matrix product's speed), `peak_memory` (MiB),
        `retries` (of the allocator, in all turns), `padding` and `waiting` (shares of tokens and of time), `startup`
        (seconds of the first step), `rates` (images a second of each turn), `validation_per_second`, `cache`, and
        what `compare` adds: medians over turns.  A variant that fits in no batch has `out_of_memory`, one that ended
        in an error `failed`.  With `curves`: `name`, `batch_size` and `losses`.
    """
    on_gpu, frozen = torch.cuda.is_available(), not load_or_shape(config.model, "meta").recipe.train_vision
    jobs = ["losses"] if config.curves else ["turn"] * config.rounds
    jobs += ["validate"] * (config.validation and not config.curves and min(2, config.rounds))
    rows: dict[str, dict] = {}
    began = time.perf_counter()
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = replace(config, out=out, epochs=2, tracking="disabled", resume=False)
        variants = curves_of(run, on_gpu) if config.curves else variants_of(run, on_gpu, frozen)
        chosen = [variant for variant in variants if (config.only or "") in variant.name]
        need(config, "only", bool(chosen), f"part of one of these: {', '.join(variant.name for variant in variants)}")
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        start = partial(ProcessPoolExecutor, 1, spawn, load_by, (multiprocessing.get_start_method(),))
        processes = {variant: stack.enter_context(start()) for variant in chosen}
        wait([process.submit(do, "rest", variant) for variant, process in processes.items()])
        for job, (variant, process) in product(jobs, processes.items()):
            over = {"failed", "out_of_memory"} & rows.get(variant.name, {}).keys()
            if over or job == "validate" and not variant.answers:
                continue
            rows[variant.name] = row = ask(process, job, variant)
            report = {"rows": compare(list(rows.values()))}
            if config.json is not None:
                write_report(config.json, report, config)
            spent = f"[{time.perf_counter() - began:.0f} s]"  # with starts and compilation, which the rates leave out
            print(spent, variant.name, row.get("rates", row), row.get("validation_rates", ""), flush=True)
    print("\n" + table(report["rows"]))
    return report
