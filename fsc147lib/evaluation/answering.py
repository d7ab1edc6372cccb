"""Answer every image of a split, and measure answers and maps.

The model answers greedily.  Count loss and maps are those under the true answer, as in training.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data import Sample
from ..data.fsc147 import MAX_PIXELS, open_split, split_counts
from ..files import write_json, write_text
from ..model import (
    Attention,
    Batch,
    Collate,
    Compute,
    CountingModel,
    Heatmap,
    KeptFeatures,
    PixelStore,
    choose_compute,
    default_workers,
    load_model,
    make_heatmap,
    method_names,
    read_prompts,
    to_device,
)  # fmt: skip
from ..model.answers import count_loss
from ..model.prompt import longest_answer, parse_count
from ..options import Precision, need, need_report
from ..readers import progress_bar, read, reader_options
from .metrics import (
    absolute_errors,
    absurd_answers,
    alignment,
    constant_baselines,
    counting_metrics,
    metrics_by_bin,
    parse_count_leniently,
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig:
    """Answer a split and measure counts and maps."""

    data: Path
    """Folder in FSC147's official layout."""
    model: str = "tiny"
    """"tiny", a folder such as runs/train/best, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    split: str = "val"
    """Name of the split."""
    batch_size: int = 16
    """Images in a batch."""
    before: str | None = None
    """Second model to answer; None: the one that a run's checkpoint was trained from, if there is one."""
    json: Path | None = None
    """File for the metrics; a .csv of the same name beside it lists the images."""
    limit: int | None = None
    """Number of images, from the first; None for all."""
    category: str | None = None
    """Class of all images; the root then needs no class file."""
    max_pixels: int = MAX_PIXELS
    """Largest image, in pixels; Pillow's limit of 179 million stays."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU (fp16 on a GPU without bf16), fp32 on a CPU."""
    heatmap: str = "attention"
    """Heatmap method: attention, relative_attention, token_gradient, input_gradient, occlusion (slow) or your own."""
    attention_layers: tuple[int, ...] | None = None
    """Layers of the heatmap; None for four in the second half of the network."""
    attention_heads: tuple[int, ...] | None = None
    """Heads of the heatmap; None for all."""
    workers: int | None = None
    """Processes that read images; None: up to 8 on a GPU, 0 on a CPU."""
    longest: int | None = None
    """Most tokens in an answer; None: enough for "COUNT: " and six digits.  Models without fine-tuning need 64."""

    def __post_init__(self):
        need_report(self, "images")
        need(self, "heatmap", self.heatmap in method_names(), f"one of {', '.join(method_names())}")
        need(self, "batch_size", self.batch_size >= 1, "at least 1")
        for name in ("limit", "longest"):
            need(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        need(self, "workers", self.workers is None or self.workers >= 0, "at least 0")


@dataclass
class ImageResult:
    """An image, a row of the CSV."""

    name: str
    category: str
    count: int
    predicted: int | None  # None where the answer does not parse
    answer: str
    error: float  # in objects, of `metrics.absolute_errors`
    predicted_leniently: int | None = None  # of `parse_count_leniently`; not used for `error`
    alignment: dict[str, float | None] = field(default_factory=dict)  # values are None for an empty scene

    def row(self) -> dict:
        """Fields and alignments in a flat dict."""
        row = asdict(self)
        return {**row, **row.pop("alignment")}


@dataclass
class Evaluation:
    """Results of a split."""

    metrics: dict[str, float | None]  # None where no image has the metric, such as `kl` of empty scenes alone
    bins: dict[str, dict[str, float | None]]  # of `metrics_by_bin`
    images: list[ImageResult]
    baselines: dict[str, dict[str, float | None]] = field(default_factory=dict)  # {} without training counts

    def write(self, path: str | Path, **about) -> None:
        """Write metrics, bins, baselines and `about` as JSON to `path`, and the images as CSV beside it."""
        write_json(path, {**about, "metrics": self.metrics, "bins": self.bins, "baselines": self.baselines})
        write_text(Path(path).with_suffix(".csv"), to_csv([image.row() for image in self.images]))


def to_csv(rows: list[dict]) -> str:
    """Dicts with the same keys as CSV text with a header; a ' goes before text that a spreadsheet would compute."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(rows[0])
    for row in rows:
        formula = [isinstance(x, str) and x.startswith(("=", "+", "-", "@", "\t", "\r")) for x in row.values()]
        table.writerow(f"'{x}" if quote else x for x, quote in zip(row.values(), formula, strict=True))
    return text.getvalue()


@dataclass(frozen=True)
class Reading:
    """How images reach the model."""

    batch_size: int = 16  # images in a batch
    batch_tokens: int | None = None  # limit of a batch's tokens, padding included; replaces `batch_size`
    workers: int = 0  # processes that read images
    features: KeptFeatures | None = None  # replace the images
    store: PixelStore | None = None  # keeps images for the next evaluation, without workers
    longest: int | None = None  # most tokens in an answer; None: enough for the longest number that parses


@torch.no_grad()
def evaluate_samples(
    model: CountingModel,
    samples: list[Sample],
    heatmap: Heatmap | None = None,
    compute: Compute | None = None,
    training_counts: Sequence[int] = (),
    reading: Reading = Reading(),
) -> Evaluation:
    """Evaluate a model that is in memory; it is moved to the compute's device and answers in eval mode.

    Args:
        heatmap: method whose maps are compared with the targets; None for the attention.
        compute: device and precision; None for `choose_compute()`.
        training_counts: counts of the training images, for baselines, for absurd answers, and for the error of an
            unparsed answer on an empty scene (their mean; without any, the mean of `samples`).

    Returns:
        Metrics: `counting_metrics`; `absurd_answers`; `unparsed`, rate of answers that do not parse, 0..1;
        `unparsed_leniently` and `mae_lenient`, with answers read by `parse_count_leniently`; `count_loss` in nats per
        answer token; means of `alignment` over images with objects.

    Raises:
        ValueError: a metric is not finite.
    """
    compute, counts = compute or choose_compute(), [sample.count for sample in samples]
    empty_cost, was_training = float(np.mean(list(training_counts) or counts)), model.network.training
    model.network.to(compute.device).eval()
    results: dict[int, ImageResult] = {}
    loss = tokens = 0.0
    for places, batch, said, summed, maps in answer_batches(model, samples, heatmap, compute, reading):
        loss, tokens = loss + summed, tokens + batch["answer_tokens"]
        for row, place in enumerate(places):
            sample, text, predicted = samples[place], said[row][0], parse_count(said[row][0])
            error = float(absolute_errors([predicted], [sample.count], empty_cost)[0])
            aligned = {name: values[row] if sample.count else None for name, values in maps.items()}
            lenient = parse_count_leniently(text, complete=said[row][1])
            result = ImageResult(sample.name, sample.category, sample.count, predicted, text, error, lenient, aligned)
            results[place] = result
    model.network.train(was_training)
    images = [results[place] for place in range(len(samples))]
    return _summarise(images, float(loss) / tokens, empty_cost, training_counts)


def answer_batches(
    model: CountingModel, samples: list[Sample], heatmap: Heatmap | None, compute: Compute, reading: Reading
) -> Iterator[tuple[list[int], Batch, list[tuple[str, bool]], torch.Tensor, dict[str, list[float]]]]:
    """For each batch: indices in `samples`, batch, answers (text, whether complete), summed count loss, alignment."""
    network, tokenizer, features = model.network, model.tokenizer, reading.features
    heatmap, longest = heatmap or make_heatmap(network), reading.longest or longest_answer(tokenizer)
    collate = Collate(tokenizer, model.image_processor, reading.store, pixels=features is None)
    lengths = [collate.lengths(sample)[2] for sample in samples]
    chunks = answering_chunks(lengths, reading.batch_size, reading.batch_tokens)
    loader = DataLoader(
        [[samples[i] for i in chunk] for chunk in chunks], batch_size=None, collate_fn=collate,
        pin_memory=torch.cuda.is_available(), **reader_options(0 if features else reading.workers),
    )  # fmt: skip
    batches = progress_bar(read(loader), desc="evaluate", total=len(chunks), leave=False)
    for places, batch in zip(chunks, batches, strict=True):
        batch = to_device(batch, compute.device)
        batch = features.add_to(batch) if features else batch
        with compute.autocast():
            prompts = read_prompts(network, batch)
            logits, looked = heatmap.with_logits(batch, prompts=prompts)
            answers = prompts.greedy(longest, tokenizer.eos_token_id).tolist()
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        said = [(text, tokenizer.eos_token_id in tokens) for text, tokens in zip(texts, answers, strict=True)]
        maps = {name: values.tolist() for name, values in alignment(looked, batch["target"]).items()}
        yield places, batch, said, count_loss(logits.detach(), batch["answer_labels"]), maps


def answering_tokens(training_tokens: int, heatmap: Heatmap) -> int:
    """Tokens that fit in an answering batch if `training_tokens` fit in a training pass.

    Four times as many fit without gradients.  Attention methods need none; the others are counted as needing them.
    """
    return 4 * training_tokens if isinstance(heatmap, Attention) else training_tokens


def answering_chunks(lengths: list[int], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Indices sorted by length, in chunks of `batch_size`; or, if given, of up to `batch_tokens` with padding."""
    chunks: list[list[int]] = [[]]
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(chunks[-1]) + 1
        full = size > batch_size if batch_tokens is None else size * lengths[place] > batch_tokens
        if chunks[-1] and full:
            chunks.append([])
        chunks[-1].append(place)
    return chunks


def _summarise(images: list[ImageResult], loss: float, empty_cost: float, training_counts: Sequence[int]) -> Evaluation:
    counts = [image.predicted for image in images], [image.count for image in images], empty_cost
    leniently = [image.predicted_leniently for image in images]
    metrics = {
        **counting_metrics(*counts),
        **absurd_answers(*counts, training_counts),
        "unparsed": float(np.mean([image.predicted is None for image in images])),
        "unparsed_leniently": float(np.mean([number is None for number in leniently])),
        "mae_lenient": float(absolute_errors(leniently, *counts[1:]).mean()),
        "count_loss": loss,
    }
    for key in images[0].alignment:
        values = [image.alignment[key] for image in images if image.count]
        metrics[key] = float(np.mean(values)) if values else None
    if wrong := [f"{name} is {value}" for name, value in metrics.items() if not np.isfinite(value or 0)]:
        raise ValueError(f"{', '.join(wrong)}: the model is broken, or its images are; look with `verify`")
    baselines = constant_baselines(training_counts, counts[1]) if len(training_counts) else {}
    return Evaluation(metrics, metrics_by_bin(*counts), images, baselines)


def model_before(model: str) -> str | None:
    """The model that a checkpoint of a run was trained from, as the run's config.json tells; None of other models."""
    try:
        options = json.loads((Path(model).parent / "config.json").read_text())
        return options["model"] if "attention_weight" in options else None
    except (OSError, ValueError, KeyError):
        return None


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Load a model and evaluate a split, as `fsc147lib evaluate` does; nothing is printed or written."""
    samples = open_split(config.data, config.split, config.limit, config.category, None, config.max_pixels)
    model = load_model(config.model)
    compute = choose_compute(config.precision)
    heatmap = make_heatmap(model.network, config.heatmap, config.attention_layers, config.attention_heads)
    workers = default_workers() if config.workers is None else config.workers
    reading = Reading(config.batch_size, workers=workers, longest=config.longest)
    return evaluate_samples(model, samples, heatmap, compute, split_counts(config.data), reading)
