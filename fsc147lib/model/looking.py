"""`look` and `predict`: a model's answers to some samples, where it looked, and how probable each number is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data import Fill, Picture, Sample, hide
from ..options import ConfigError
from ..readers import progress_bar
from .answers import answer_texts, count_log_probabilities, own_answers
from .collate import Batch, Collate, to_device
from .device import Compute, choose_compute
from .forward import Prompts, read_prompts
from .heatmaps import Attention, digits_mass, make_heatmap
from .network import CountingModel
from .prompt import parse_count

Whose = Literal["own", "true"]
Word = Literal["all", "first", "last", "before"]  # digits of an answer, or the token before the first one


@dataclass
class Look:
    """Maps of N samples, and the answers to which they belong."""

    maps: torch.Tensor  # attention mass of each layer and head [N, L, H, 14, 14]; of another method [N, 14, 14]
    answers: list[str]  # for example "COUNT: 12"
    whose: Whose  # the model's "own" answers, or the "true" ones

    @property
    def titles(self) -> list[str]:
        """`map_title` of each sample."""
        return [map_title(answer, self.whose) for answer in self.answers]

    def __getitem__(self, rows: slice | list[int]) -> "Look":
        """The maps of some samples."""
        places = range(len(self.answers))[rows] if isinstance(rows, slice) else list(rows)
        return Look(self.maps[list(places)], [self.answers[i] for i in places], self.whose)


def map_title(answer: str, whose: str) -> str:
    """A figure's title of a map: "own answer 12", or the start of the answer if it has no number."""
    count = parse_count(answer)
    short = answer if len(answer) <= 20 else answer[:19] + "…"
    return f"{whose} answer {repr(short) if count is None else count}"


@torch.no_grad()
def look(
    model: CountingModel, samples: list[Sample], layers: tuple[int, ...] | None = None, batch_size: int = 16,
    answer: Whose = "own", method: str = "attention", heads: tuple[int, ...] | None = None, word: Word = "all",
) -> Look:  # fmt: skip
    """Maps of where a model looks on some samples while it answers, on the CPU in float32.

    The model is moved to the GPU, if there is one, and put in eval mode.

    `layers` and `heads` are those whose attention is read; None for `default_layers` and all heads.  The answers are
    the model's "own", or the "true" counts as in training.  `word` chooses "all" digits of an answer, the "first", the
    "last", or the token "before" the first; in an answer without digits all tokens count as digits.
    """
    compute, heatmap = choose_compute(), make_heatmap(model.network, method, layers, heads)
    maps, answers = [], []
    for batch, prompts in answered_batches(model, samples, compute, batch_size, answer, word):
        with compute.autocast():
            if type(heatmap) is Attention:
                rows = prompts.read_answers(batch, heatmap.layers)[1]
                found = digits_mass(torch.stack([rows[layer] for layer in heatmap.layers], dim=1), batch)
                found = found if heads is None else found[:, :, list(heads)]
            else:
                found = heatmap.with_logits(batch, prompts=prompts)[1]
        maps.append(found.float().cpu())
        answers += answer_texts(model, batch)
    return Look(torch.cat(maps), answers, answer)


def answered_batches(
    model: CountingModel, samples: list[Sample], compute: Compute, batch_size: int = 16, answer: Whose = "own",
    word: Word = "all",
) -> Iterator[tuple[Batch, Prompts]]:  # fmt: skip
    """Yield batches with the answers and word that `look` describes, and the questions as `read_prompts` gives them."""
    network = model.network.to(compute.device).eval()
    collate, texts = (Collate(model.tokenizer, model.image_processor, pixels=pixels) for pixels in (True, False))
    for start in progress_bar(range(0, len(samples), batch_size), desc="pictures", leave=False):
        chunk = samples[start : start + batch_size]
        batch = to_device(collate(chunk), compute.device)
        with compute.autocast():
            if answer == "true":
                prompts = read_prompts(network, batch)
            else:
                answers, prompts = own_answers(model, batch)
                batch |= to_device(texts(chunk, answers), compute.device)
        yield with_word(batch, word), prompts


def with_word(batch: Batch, word: Word) -> Batch:
    """A copy of the batch in which `digit_weights` is 1 at one token of each answer, and 0 elsewhere.

    That token is the "first" digit, the "last" digit, or the one "before" the first digit; "all" leaves the batch as it
    is.  ConfigError for another value.
    """
    if word not in get_args(Word):
        raise ConfigError(f"word is {word!r}, but must be one of {', '.join(get_args(Word))}")
    if word == "all":
        return batch
    digit = (batch["digit_weights"] > 0).int()  # [B, A]
    first, last = digit.argmax(dim=1), digit.shape[1] - 1 - digit.flip(1).argmax(dim=1)  # [B] each
    place = {"first": first, "last": last, "before": (first - 1).clamp_min(0)}[word]
    weights = F.one_hot(place, digit.shape[1]).to(batch["digit_weights"])
    return {**batch, "digit_weights": weights}


def mean_map(look: Look, layers: list[int] | None = None) -> Look:
    """A `Look` with maps [N, 14, 14] that sum to 1: attention is averaged over heads and layers.

    `layers` are indices into the second axis of the maps; None is all.
    """
    if look.maps.ndim == 3:
        return look
    mean = (look.maps if layers is None else look.maps[:, layers]).mean(dim=(1, 2))
    return replace(look, maps=mean / mean.sum(dim=(1, 2), keepdim=True))


def corner_share(maps: torch.Tensor) -> torch.Tensor:
    """Mean share of maps [N, L, H, 14, 14] in the top-left cell, where Qwen-VL has an attention sink: [L, H]."""
    return (maps[..., 0, 0] / maps.sum(dim=(-1, -2)).clamp_min(1e-9)).mean(dim=0)


@dataclass
class Prediction:
    """A model's answer to one picture."""

    sample: Sample  # the picture, and the category that was counted
    answer: str  # greedy, raw
    count: int | None  # the number in it; None if it does not parse
    distribution: np.ndarray  # [10000] float64, summing to 1: probability of each number, given that one is answered
    covered: float  # probability of an answer that is one of these numbers, in the form "COUNT: 37"
    heatmap: np.ndarray  # [14, 14] float32, summing to 1: where the model looked during its own answer
    not_followed: float = 0.0  # probability of an answer that begins as a number from 10,000 up

    @property
    def mode(self) -> int:
        """The most probable number; the greedy answer, chosen digit by digit, may be another."""
        return int(self.distribution.argmax())

    @property
    def no_number(self) -> float:
        """Probability of an answer that is no number: words, or another spelling such as "COUNT: 007"."""
        return max(0.0, 1 - self.covered - self.not_followed)

    @property
    def mean(self) -> float:
        return float(self.distribution @ np.arange(len(self.distribution)))

    def interval(self, level: float = 0.9) -> tuple[int, int]:
        """First and last number of the central interval that holds at least `level` of the probability."""
        below = self.distribution.cumsum()
        ends = np.searchsorted(below, ((1 - level) / 2, below[-1] - (1 - level) / 2))
        return int(ends[0]), int(min(ends[1], len(below) - 1))


def predict(model: CountingModel, image: str | Path | Image.Image, category: str) -> Prediction:
    """Count objects such as "apples" in a picture, a file or an image; DataError if picture or category is unfit.

    The picture is turned upright, and its shorter side is shrunk to 384 pixels.  The model is moved as by `look`.
    """
    return predict_samples(model, [Picture(image, category)])[0]


@torch.no_grad()
def predict_samples(
    model: CountingModel, samples: list[Sample], batch_size: int = 8, compute: Compute | None = None
) -> list[Prediction]:
    """`predict` for many samples; `compute` None is `choose_compute()`."""
    compute, heatmap = compute or choose_compute(), make_heatmap(model.network)
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
    model: CountingModel, image_or_sample: str | Path | Image.Image | Sample, cells: np.ndarray, fill: Fill = "grey",
    category: str | None = None,
) -> Prediction:  # fmt: skip
    """Hide cells of a picture, a grid such as [14, 14] that is True where hidden, and count in the rest.

    `fill` is middle "grey", the picture's "mean" colour, or its "blur".  The prediction's `sample` is the picture that
    the model saw, with the dots that are left.  DataError if picture, cells or category are unfit.
    """
    sample = image_or_sample if isinstance(image_or_sample, Sample) else Picture(image_or_sample, category or "")
    return predict_samples(model, [hide(sample, cells, fill, category)])[0]
