"""What both benchmarks share: a clock, variants that take turns, a table, and a file that says on what it was measured.

Variants take turns in one process, so that a machine whose speed drifts slows all of them alike, and are
compared by ratios within a turn.

Left out: what is timed (`overhead`, `throughput`), and drawing (`figures`).
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from ..evaluation.answering import to_csv
from ..files import write_json, write_text
from ..model.device import seconds_of


def take_turns(
    trials: dict[Hashable, Callable[[int], dict[str, float]]], rounds: int, warmup: int = 0
) -> dict[Hashable, dict[str, np.ndarray]]:
    """Run trials in turn: A B C A B C ...

    Args:
        trials: name -> function of the round's number (below 0 in a warm-up) to numbers, such as "seconds".
        rounds: counted rounds, after `warmup` ones.

    Returns:
        name -> number's name -> [rounds].
    """
    found: dict[Hashable, list[dict[str, float]]] = {name: [] for name in trials}
    for turn in range(-warmup, rounds):
        for name, trial in trials.items():
            numbers = trial(turn)
            if turn >= 0:
                found[name].append(numbers)
    return {name: {key: np.array([row[key] for row in rows]) for key in rows[0]} for name, rows in found.items()}


def step_flops(config, images: int, tokens: int, patches: int, encoder: bool) -> float:
    """Multiplications and additions that a training step needs, padding left out; the language model trains.

    Linear layers: 2 a weight and position forward, 4 backward; causal attention: half of all pairs; of the
    last layer the keys and values at all positions, the rest and the output head at 7 an image; the vision
    encoder (a frozen one) forward only.
    """
    text, vision = config.text_config, config.vision_config
    width, inner = text.hidden_size, text.num_attention_heads * text.head_dim
    grouped = text.num_key_value_heads * text.head_dim
    layer = width * (2 * inner + 2 * grouped + 3 * text.intermediate_size)
    length = tokens / images
    flops = 6 * tokens * ((text.num_hidden_layers - 1) * (layer + inner * length) + 2 * grouped * width)
    flops += 6 * 7 * images * (layer + text.vocab_size * width)
    if encoder:
        block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        flops += 2 * vision.depth * patches * (block + 2 * vision.hidden_size * patches / images)
    return flops


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product of random numbers: median of five."""
    n = 8192 if device.type == "cuda" else 512  # a CPU without bfloat16 takes minutes for more
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device.type) for _ in range(7)]
    return 2 * n**3 / float(np.median(seconds[2:]))


COLUMNS = {
    "seconds_median": ("s per step (quartiles)", "{seconds_median:.3f} ({seconds_low:.3f} to {seconds_high:.3f})"),
    "overhead_median": (
        "overhead (95 % interval)",
        "{overhead_median:.1%} ({overhead_low:.1%} to {overhead_high:.1%})",
    ),
    "overhead_lazy": ("on each K-th step", "{overhead_lazy:.1%} (K = {every})"),
    "batch_size": ("batch", "{batch_size}"),
    "images_per_second": ("images/s", "{images_per_second:.1f}"),
    "spread": ("spread over 10 %", "{spread:.0%}"),
    "speedup": ("of the plain loop", "{speedup:.2f}x"),
    "over_trainer": ("of Trainer", "{over_trainer:.2f}x"),
    "peak_share": ("of peak", "{peak_share:.1%}"),
    "peak_memory": ("peak GiB", "{peak_memory:.2f}"),
    "retries": ("retries", "{retries}"),
    "padding": ("padding", "{padding:.1%}"),
    "waiting": ("waiting", "{waiting:.1%}"),
    "startup": ("first step, s", "{startup:.0f}"),
    "validation_per_second": ("validation images/s", "{validation_per_second:.1f}"),
}
"""A number's name in a row, its column's head, and how the row is written there."""


def table(rows: Iterable[dict], columns: dict[str, tuple[str, str]] = COLUMNS, head: str = "variant") -> str:
    """Rows as text: a line for each, with its `name` under `head` and the columns that any row has numbers for."""
    rows = list(rows)
    shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [[head, *(title for title, _ in shown.values())]]
    for row in rows:
        ended = ": out of memory" if row.get("out_of_memory") else ": failed" if row.get("failed") else ""
        name, row = row["name"] + ended, row | {"peak_memory": row.get("peak_memory") and row["peak_memory"] / 1024}
        cells.append([name, *("" if row.get(key) is None else form.format(**row) for key, (_, form) in shown.items())])
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        line[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in cells
    )


def write_report(path: str | Path, report: dict, config=None) -> None:
    """Write a benchmark's report as JSON, with the command, its options and the machine; the rows also as .csv.

    Args:
        report: with `rows`.
        config: the command's dataclass.
    """
    path, options = Path(path), asdict(config) if config else {}
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    about = {"command": "python -m fsc147lib " + " ".join(sys.argv[1:]), **options, **machine()}
    write_json(path, {**about, **report})
    keys = dict.fromkeys(key for row in report["rows"] for key in row)
    write_text(path.with_suffix(".csv"), to_csv([{key: row.get(key) for key in keys} for row in report["rows"]]))


def machine() -> dict:
    """What a timing was measured on, and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read_report(path: str | Path) -> tuple[dict, str]:
    """A file of `write_report`, and a line that says on what, when and how it was measured."""
    report = json.loads(Path(path).read_text())
    processor = report["gpu"] or f"{report['threads']} cores of {report['processor']}"
    versions = f"torch {report['torch']}, transformers {report['transformers']}"
    return report, f"{processor}, {versions}, {report['date']}: {report['command']}"
