"""Answer every image of a split and measure the answers and the maps.

Answers are greedy and free; losses and maps are those of the training objective, read while the right
answer is forced, so that they can be compared with the training log.

Left out: drawing, and what to do with the numbers.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from .collate import Batch, Collate, to_device
from .config import EvaluateConfig
from .data import Sample, open_split
from .files import write_text
from .heatmaps import Heatmap
from .losses import count_loss
from .metrics import alignment, counting_metrics, metrics_by_bin
from .model import CountingModel, load_model, make_accelerator
from .prompt import MAX_DIGITS, parse_count


@dataclass
class ImageResult:
    """One image's row in the CSV."""

    name: str
    category: str
    count: int
    predicted: int | None  # None where the answer does not parse
    answer: str
    kl: float
    mass_on_objects: float
    pearson: float
    pointing: float


@dataclass
class Evaluation:
    """Numbers of a split: `metrics` of the whole, `bins` by true count, `images` one by one."""

    metrics: dict[str, float]
    bins: dict[str, dict[str, float]]
    images: list[ImageResult]

    def write(self, path: str | Path, **about) -> None:
        """Write `path` (JSON: metrics, bins and `about`) and, beside it with the ending .csv, the images."""
        path = Path(path)
        write_text(path, json.dumps({**about, "metrics": self.metrics, "bins": self.bins}, indent=1))
        write_text(path.with_suffix(".csv"), to_csv([asdict(image) for image in self.images]))


def to_csv(rows: list[dict]) -> str:
    """Rows with the same keys as CSV text, with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


@torch.no_grad()
def evaluate_samples(
    model: CountingModel,
    samples: list[Sample],
    batch_size: int = 16,
    heatmap: Heatmap | None = None,
    accelerator: Accelerator | None = None,
    workers: int = 0,
) -> Evaluation:
    """Evaluate a model that is already in memory.

    Args:
        model: its network is moved to the accelerator's device, and answers in eval mode.
        samples: with images.
        heatmap: what is held against the target; None for `Heatmap(model.network)`, the attention.
        accelerator: gives device and precision; None for `make_accelerator("auto")`.

    Returns:
        Metrics: mae, rmse, nae, sre (unparsed answers as 0), unparsed (rate, 0..1), count_loss (nats per
        answer token), kl, mass_on_objects, pearson, pointing.
    """
    accelerator = accelerator or make_accelerator("auto")
    network = model.network.to(accelerator.device)
    was_training = network.training
    network.eval()
    heatmap = heatmap or Heatmap(network)
    # wide images apart from narrow ones, so that batches hold little padding
    order = sorted(range(len(samples)), key=lambda i: samples[i].size[1] / samples[i].size[0])
    chunks = [[samples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    collate = partial(forced_and_free, Collate(model.tokenizer, model.image_processor))
    loader = DataLoader(chunks, batch_size=None, collate_fn=collate, num_workers=workers)
    results, loss, tokens = [], 0.0, 0
    progress = tqdm(zip(chunks, loader, strict=True), total=len(chunks), desc="evaluate", leave=False)
    for chunk, (forced, free) in progress:
        forced, free = (to_device(batch, accelerator.device) for batch in (forced, free))
        with accelerator.autocast():
            logits, looked = heatmap.with_logits(forced)
            answers = generate_answers(model, free)
        loss += float(count_loss(logits, forced["answer_labels"]))
        tokens += int((forced["answer_labels"] != -100).sum())
        maps = alignment(looked, forced["target"])
        maps = {key: value.tolist() for key, value in maps.items()}
        for i, (sample, text) in enumerate(zip(chunk, answers, strict=True)):
            row = {key: value[i] for key, value in maps.items()}
            results.append(ImageResult(sample.name, sample.category, sample.count, parse_count(text), text, **row))
    network.train(was_training)
    place = {name: i for i, name in enumerate(sample.name for sample in samples)}
    results.sort(key=lambda result: place[result.name])
    return _summarise(results, loss / tokens)


def forced_and_free(collate: Collate, samples: list[Sample]) -> tuple[Batch, Batch]:
    """A batch with the right answers and one to be answered, of the same images."""
    pixels = collate.pixels(samples)
    return collate.assemble(samples, pixels), collate.assemble(samples, pixels, answers=False)


def _summarise(images: list[ImageResult], loss: float) -> Evaluation:
    predicted, target = [image.predicted or 0 for image in images], [image.count for image in images]
    maps = {key: float(np.mean([getattr(image, key) for image in images])) for key in
            ("kl", "mass_on_objects", "pearson", "pointing")}  # fmt: skip
    metrics = {
        **counting_metrics(predicted, target),
        "unparsed": float(np.mean([image.predicted is None for image in images])),
        "count_loss": loss,
        **maps,
    }
    bins = metrics_by_bin(predicted, target, unparsed=[image.predicted is None for image in images])
    return Evaluation(metrics, bins, images)


def generate_answers(model: CountingModel, prompts: Batch) -> list[str]:
    """Greedy answers, at most as long as the longest number that parses.

    Args:
        model: its network in eval mode.
        prompts: from `Collate(answers=False)`, on the network's device.

    Returns:
        One text for each prompt, without special tokens.
    """
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    longest = len(model.tokenizer.encode("COUNT: " + "0" * MAX_DIGITS, add_special_tokens=False)) + 1
    ids = model.network.generate(
        **{key: prompts[key] for key in keys},
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return model.tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Load a model, evaluate a split, write what was asked for; `python -m fsc147lib evaluate` calls this."""
    samples = open_split(config.data, config.split, config.limit)
    model = load_model(config.model)
    accelerator = make_accelerator(config.precision)
    heatmap = Heatmap(
        model.network, config.heatmap, config.attention_layers, config.attention_heads, config.heatmap_layer
    )
    result = evaluate_samples(model, samples, config.batch_size, heatmap, accelerator, config.workers)
    if config.json is not None:
        result.write(config.json, data=str(config.data), split=config.split, model=str(config.model))
    return result
