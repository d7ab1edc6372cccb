"""What the attention loss costs: the same training step with and without it, timed side by side.

Variants take turns on the same batches, so that a machine whose speed drifts slows all of them alike,
and the overhead is a median of ratios taken within a turn.

Left out: gradient heatmaps, throughput, other models' shapes.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .data import Batch, Collate, Sample, to_device
from .files import write_text
from .losses import DualLoss
from .model import CountingModel, freeze_vision, make_accelerator


def time_variants(
    variants: dict[str, Callable[[int], None]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Time functions in turn: A B C A B C ...

    Args:
        variants: name -> function of the round's number.
        rounds: counted rounds, after `warmup` ones.
        device: on "cuda" each call is waited for.

    Returns:
        name -> [rounds] seconds.
    """
    seconds = {name: np.zeros(rounds) for name in variants}
    for turn in range(-warmup, rounds):
        for name, run in variants.items():
            _wait(device)
            started = time.perf_counter()
            run(turn)
            _wait(device)
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - started
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], None], device: str = "cpu") -> float | None:
    """MiB at the highest point of a call: of the GPU, or else of the whole process.

    The process's peak can be asked anew on Linux alone; elsewhere the answer is None.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    except OSError:
        return None
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def training_step(loss: DualLoss, batches: list[Batch], optimizer, accelerator) -> Callable[[int], None]:
    """A whole step as `train` makes it: both passes in its precision, and an update; on batches in turn."""

    def step(turn: int) -> None:
        with accelerator.autocast():
            total = loss(batches[turn % len(batches)]).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def write_rows(path: str | Path, rows: list[dict], **about) -> None:
    """Write timings as JSON with what they were measured on: processor, threads or GPU, versions, and `about`."""
    machine = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    write_text(path, json.dumps({**about, **machine, "rows": rows}, indent=1))


def table(rows: list[dict]) -> str:
    """The rows of `time_losses` as text: medians with quartiles in brackets."""
    lines = [f"{'variant':<20}{'ms per step':>24}{'overhead':>26}{'peak MiB':>10}"]
    for row in rows:
        low, median, high = (1000 * row[f"seconds_{key}"] for key in ("low", "median", "high"))
        overhead = "{overhead_median:.1%} ({overhead_low:.1%} to {overhead_high:.1%})".format(**row)
        peak = "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(f"{row['name']:<20}{f'{median:.0f} ({low:.0f} to {high:.0f})':>24}{overhead:>26}{peak:>10}")
    return "\n".join(lines)


def time_losses(
    model: CountingModel,
    samples: list[Sample],
    batch_size: int = 8,
    rounds: int = 20,
    weight: float = 0.1,
    train_vision: bool = True,
) -> list[dict]:
    """Time a step with the count loss alone against one with the attention loss as well.

    Args:
        model: from `load_model`; its weights move by steps of 1e-6.
        train_vision: whether the vision encoder trains as well.
        samples: cut into batches; a last incomplete one is left out.
        rounds: timed steps of each variant.
        weight: of the attention loss.

    Returns:
        A row for each variant: `name`, `seconds_median`, `seconds_low` and `seconds_high` (quartiles),
        `peak_mib`; and, against "count only" and from ratios within a round, `overhead_median`,
        `overhead_low` and `overhead_high` (quartiles), 0.03 for 3 %.

    Raises:
        ValueError: fewer samples than one batch.
    """
    if len(samples) < batch_size:
        raise ValueError(f"{len(samples)} samples make no batch of {batch_size}: give more, or a smaller batch_size")
    accelerator = make_accelerator("auto")
    device = accelerator.device.type
    model.network.to(device).train()
    freeze_vision(model.network, not train_vision)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-6, fused=True)  # one for both: half the memory
    collate = Collate(model.tokenizer, model.image_processor)
    starts = range(0, len(samples) - batch_size + 1, batch_size)
    batches = [to_device(collate(samples[start : start + batch_size]), device) for start in starts]
    variants = {
        "count only": training_step(DualLoss(model.network, weight=0), batches, optimizer, accelerator),
        "count + attention": training_step(DualLoss(model.network, weight=weight), batches, optimizer, accelerator),
    }
    seconds = time_variants(variants, rounds, device=device)
    rows = []
    for name, step in variants.items():
        overhead = seconds[name] / seconds["count only"] - 1
        row = {"name": name, "peak_mib": peak_memory(lambda step=step: step(0), device)}
        for key, values in (("seconds", seconds[name]), ("overhead", overhead)):
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            row |= {f"{key}_low": float(low), f"{key}_median": float(median), f"{key}_high": float(high)}
        rows.append(row)
    return rows
