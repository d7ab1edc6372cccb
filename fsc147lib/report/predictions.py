"""The command `predict`: counts in pictures, printed, written as JSON, and drawn."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from ..data import Picture, Sample
from ..files import write_json
from ..model import Prediction, choose_compute, load_model, predict_samples
from ..options import Precision, need, need_report
from .figures import save_prediction


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


def predict_files(config: PredictConfig) -> None:
    """Count in picture files; print, write and draw what was found.

    Raises:
        DataError, ModelError: a picture, the category or the model cannot be used.
    """
    pictures: list[Sample] = [Picture(path, config.category) for path in config.images]
    found = predict_samples(load_model(config.model), pictures, compute=choose_compute(config.precision))
    if config.json is not None:
        write_json(config.json, {"model": config.model, "predictions": [numbers(each) for each in found]})
    for i, prediction in enumerate(found, 1):
        print(sentences(prediction))
        if config.map is not None:
            path = config.map if len(found) == 1 else config.map.with_stem(f"{config.map.stem}-{i}")
            save_prediction(prediction, path)
            print(f"  map in {path}")


def sentences(found: Prediction) -> str:
    """A prediction in three lines of text."""
    first, last = found.interval()
    said = "no number" if found.count is None else f"{found.count} {found.sample.category}"
    return (
        f"{found.sample.name}: {said}; the model says {found.answer!r:.80}\n"
        f"  most probable {found.mode} ({found.distribution[found.mode]:.0%}), mean {found.mean:.1f}, 90 % between "
        f"{first} and {last}, if it answers COUNT: and a number, which it does with probability {found.covered:.3f}\n"
        f"  no number {found.no_number:.3f}, not followed (numbers from 10,000 up) {found.not_followed:.3f}"
    )


def numbers(found: Prediction) -> dict:
    """A prediction as values for JSON; of the distribution, the numbers that are likelier than one in a million."""
    likely = np.flatnonzero(found.distribution > 1e-6).tolist()
    names = ("answer", "count", "mode", "mean", "covered", "not_followed", "no_number")
    return {
        "name": found.sample.name, "category": found.sample.category, **{name: getattr(found, name) for name in names},
        "interval_90": found.interval(),
        "distribution": {number: float(found.distribution[number]) for number in likely},
        "heatmap": found.heatmap.tolist(), "heatmap_of": "own answer",
    }  # fmt: skip
