"""`predict`: the count in any picture, the probability of each number, and where the model looked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tyro.conf import Positional

from ..data import Fill, Picture, Sample, hide
from ..files import write_json
from ..options import Precision, need, need_report
from .counts import count_log_probabilities
from .device import Compute, choose_compute
from .heatmaps import Heatmap, make_heatmap
from .load import load_model
from .looking import answer_texts, answered_batches, map_title
from .network import CountingModel
from .prompt import parse_count


@dataclass(frozen=True)
class PredictConfig:
    """Count in pictures of your own."""

    images: Positional[tuple[Path, ...]]
    """Picture files."""
    category: str
    """What to count, for example apples."""
    model: str = "tiny-dual"
    """"tiny-dual", a folder such as runs/train/best, or a hub id such as Qwen/Qwen3-VL-2B-Instruct."""
    map: Path | None = None
    """Draw picture, map and probabilities here; of several pictures to the same name with -1, -2, ..."""
    json: Path | None = None
    """Write all numbers here."""
    precision: Precision = "auto"
    """auto: bf16 autocast on a GPU (fp16 on one that has no bf16), fp32 elsewhere."""

    def __post_init__(self):
        need(self, "images", len(self.images) > 0, "a picture or more")
        formats = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
        need(self, "map", self.map is None or self.map.suffix in formats, f"a file that ends in {', '.join(formats)}")
        need_report(self)

    def map_path(self, i: int) -> Path:
        """Where the map of the i-th picture goes."""
        return self.map if len(self.images) == 1 else self.map.with_stem(f"{self.map.stem}-{i + 1}")


@dataclass
class Prediction:
    """A model's answer to one picture."""

    sample: Sample  # the picture, and what was counted in it
    answer: str  # greedy, raw
    count: int | None  # the number in it; None where it does not parse
    distribution: np.ndarray  # [10000] float64, summing to 1: probability of each number, if the answer is a number
    covered: float  # probability that the answer is one of these numbers, in the form "COUNT: 37"
    heatmap: np.ndarray  # [14, 14] float32, summing to 1: where it looked during its own answer
    not_followed: float = 0.0  # probability of an answer that begins as a number from 10,000 up

    @property
    def mode(self) -> int:
        """The most probable number; the greedy answer, chosen digit by digit, may be another."""
        return int(self.distribution.argmax())

    @property
    def no_number(self) -> float:
        """Probability of any other answer: words, or another spelling such as "COUNT: 007"."""
        return max(0.0, 1 - self.covered - self.not_followed)

    @property
    def mean(self) -> float:
        return float(self.distribution @ np.arange(len(self.distribution)))

    def interval(self, level: float = 0.9) -> tuple[int, int]:
        """First and last number of the central interval that holds at least `level` of the probability."""
        below = self.distribution.cumsum()
        ends = np.searchsorted(below, ((1 - level) / 2, below[-1] - (1 - level) / 2))
        return int(ends[0]), int(min(ends[1], len(below) - 1))

    @property
    def map_title(self) -> str:
        """The answer of the map, for a figure."""
        return map_title(self.answer, "own")

    def __str__(self) -> str:
        first, last = self.interval()
        said = f"{self.count} {self.sample.category}" if self.count is not None else "no number"
        return (
            f"{self.sample.name}: {said}; the model says {self.answer!r:.80}\n"
            f"  most probable {self.mode} ({self.distribution[self.mode]:.0%}), mean {self.mean:.1f}, 90 % between "
            f"{first} and {last}, if it answers COUNT: and a number, which it does with probability {self.covered:.3f}"
            f"\n  no number {self.no_number:.3f}, not followed (numbers from 10,000 up) {self.not_followed:.3f}"
        )

    def to_dict(self) -> dict:
        """Plain values for JSON, with the numbers that are more probable than one in a million."""
        likely = np.flatnonzero(self.distribution > 1e-6)
        return {
            "name": self.sample.name, "category": self.sample.category, "answer": self.answer, "count": self.count,
            "mode": self.mode, "mean": self.mean, "interval_90": self.interval(), "covered": self.covered,
            "not_followed": self.not_followed, "no_number": self.no_number,
            "distribution": {int(number): float(self.distribution[number]) for number in likely},
            "heatmap": self.heatmap.tolist(), "heatmap_of": "own answer",
        }  # fmt: skip


def predict(model: CountingModel, image: str | Path | Image.Image, category: str) -> Prediction:
    """Count objects such as "apples" in one picture, a file or an image; a DataError says why that cannot be.

    The picture is turned upright, its shorter side is shrunk to 384 pixels.  The model moves to the GPU, if there is
    one, in eval mode.
    """
    return predict_samples(model, [Picture(image, category)])[0]


def predict_files(config: PredictConfig) -> list[Prediction]:
    """Count in the pictures named and write the numbers; `fsc147lib predict` calls this."""
    pictures: list[Sample] = [Picture(path, config.category) for path in config.images]
    found = predict_samples(load_model(config.model), pictures, compute=choose_compute(config.precision))
    if config.json is not None:
        write_json(config.json, {"model": config.model, "predictions": [each.to_dict() for each in found]})
    return found


@torch.no_grad()
def predict_samples(
    model: CountingModel,
    samples: list[Sample],
    batch_size: int = 8,
    heatmap: Heatmap | None = None,
    compute: Compute | None = None,
) -> list[Prediction]:
    """`predict` for many samples; `heatmap` None is the attention, `compute` None the GPU or CPU at hand."""
    compute, heatmap = compute or choose_compute(), heatmap or make_heatmap(model.network)
    predictions: list[Prediction] = []
    for batch, prompts in answered_batches(model, samples, compute, batch_size):
        with compute.autocast():
            log_p, rest = count_log_probabilities(model, prompts)
            maps = heatmap.with_logits(batch, prompts=prompts)[1].float().cpu().numpy()
        for text, each, map_, missed in zip(answer_texts(model, batch), log_p, maps, rest.tolist(), strict=True):
            distribution = each.softmax(dim=0).numpy()
            sample, covered = samples[len(predictions)], float(each.exp().sum())
            predictions.append(Prediction(sample, text, parse_count(text), distribution, covered, map_, missed))
    return predictions


def count_without(
    model: CountingModel,
    image_or_sample: str | Path | Image.Image | Sample,
    cells: np.ndarray,
    fill: Fill = "grey",
    category: str | None = None,
) -> Prediction:
    """Hide cells of a picture and count again; a DataError says what cannot be used.

    Args:
        image_or_sample: a file, an image in memory, or a sample.
        cells: [14, 14] bool, or any other grid over the picture, True where hidden.
        fill: middle "grey", the picture's "mean" colour, or its "blur".
        category: what to count; None is the sample's own.

    Returns:
        Its `sample` is the picture that the model saw, with the dots that are left.
    """
    sample = image_or_sample if isinstance(image_or_sample, Sample) else Picture(image_or_sample, category or "")
    return predict_samples(model, [hide(sample, cells, fill, category)])[0]
