"""`look`: where a model looks on some samples, by any method, while it gives its own or the true answer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F

from ..data import Sample
from ..options import ConfigError
from ..readers import progress_bar
from .answers import own_answers
from .collate import Batch, Collate, to_device
from .device import Compute, choose_compute
from .forward import Prompts, read_prompts
from .heatmaps import Attention, layer_head_maps, make_heatmap
from .network import CountingModel
from .pixels import PixelStore
from .prompt import parse_count

Whose = Literal["own", "true"]
Word = Literal["all", "first", "last", "before"]
"""Of an answer: all digits, the first, the last, or the token before the first."""


@dataclass
class Look:
    """Maps of N samples, and the answers to which they belong."""

    maps: torch.Tensor  # [N, L, H, 14, 14] attention mass of each layer and head, or [N, 14, 14] of another method
    answers: list[str]  # for example "COUNT: 12"
    whose: Whose  # the model's "own" answers, or the "true" ones

    @property
    def titles(self) -> list[str]:
        """`map_title` of each sample."""
        return [map_title(answer, self.whose) for answer in self.answers]

    def __getitem__(self, rows) -> "Look":
        """The maps of a list or slice of places."""
        places = range(len(self.answers))[rows] if isinstance(rows, slice) else list(rows)
        return Look(self.maps[list(places)], [self.answers[i] for i in places], self.whose)


def map_title(answer: str, whose: str) -> str:
    """The answer of a map, for a figure: "own answer 12", or an answer without a number in its own words."""
    count = parse_count(answer)
    short = answer if len(answer) <= 20 else answer[:19] + "…"
    return f"{whose} answer {repr(short) if count is None else count}"


@torch.no_grad()
def look(
    model: CountingModel,
    samples: list[Sample],
    layers: tuple[int, ...] | None = None,
    batch_size: int = 16,
    answer: Whose = "own",
    method: str = "attention",
    heads: tuple[int, ...] | None = None,
    word: Word = "all",
) -> Look:
    """Where a model looks on some samples while it answers, the maps on the CPU in float32.

    Args:
        model: is moved to this machine's GPU, if it has one, and put in eval mode.
        samples: with images.
        layers, heads: of the attention; None for `default_layers` and all heads.
        answer: "own" for the model's own answers, "true" for the true counts, as in training.
        method: any name in METHODS.
        word: the digits of the answer that count; of an answer without digits all tokens do.

    Raises:
        ConfigError: no such method, layer, head or word.
    """
    compute = choose_compute()
    heatmap = make_heatmap(model.network, method, layers, heads)
    maps, answers = [], []
    for batch, prompts in answered_batches(model, samples, compute, batch_size, answer, word):
        with compute.autocast():
            if type(heatmap) is Attention:
                rows = prompts.read_answers(batch, heatmap.layers)[1]
                found = layer_head_maps(rows, batch, heatmap.layers)
                found = found if heads is None else found[:, :, list(heads)]
            else:
                found = heatmap.with_logits(batch, prompts=prompts)[1]
        maps.append(found.float().cpu())
        answers += answer_texts(model, batch)
    return Look(torch.cat(maps), answers, answer)


def answered_batches(
    model: CountingModel,
    samples: list[Sample],
    compute: Compute,
    batch_size: int = 16,
    answer: Whose = "own",
    word: Word = "all",
) -> Iterator[tuple[Batch, Prompts]]:
    """Batches of samples with the answers and the word (see `look`), and the questions as the model has read them.

    The model is moved to the compute's device and put in eval mode.
    """
    network = model.network.to(compute.device).eval()
    collate = Collate(model.tokenizer, model.image_processor)
    for start in progress_bar(range(0, len(samples), batch_size), desc="pictures", leave=False):
        chunk = samples[start : start + batch_size]
        collate.store = PixelStore(chunk, model.image_processor)
        batch = to_device(collate(chunk), compute.device)
        with compute.autocast():
            if answer == "true":
                prompts = read_prompts(network, batch)
            else:
                answers, prompts = own_answers(model, batch)
                batch = to_device(collate(chunk, answers), compute.device)
        yield with_word(batch, word), prompts


def with_word(batch: Batch, word: Word) -> Batch:
    """The batch with a word of its answers in place of all digits (tokens, where an answer has no digits)."""
    if word not in get_args(Word):
        raise ConfigError(f"word is {word!r}, but must be one of {', '.join(get_args(Word))}")
    if word == "all":
        return batch
    digit = (batch["digit_weights"] > 0).int()  # [B, A]
    first, last = digit.argmax(dim=1), digit.shape[1] - 1 - digit.flip(1).argmax(dim=1)  # [B] each
    place = {"first": first, "last": last, "before": (first - 1).clamp_min(0)}[word]
    weights = F.one_hot(place, digit.shape[1]).to(batch["digit_weights"])
    return cast(Batch, {**batch, "digit_weights": weights})


def answer_texts(model: CountingModel, batch: Batch) -> list[str]:
    """The answers in a batch."""
    ids = [[token for token in row if token >= 0] for row in batch["answer_labels"].tolist()]
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def mean_map(look: Look, layers: list[int] | None = None) -> Look:
    """Heatmaps [N, 14, 14], each summing to 1: of attention the mean over heads and layers.

    `layers` are places among the layers looked at; None is all.
    """
    if look.maps.ndim == 3:
        return look
    mean = (look.maps if layers is None else look.maps[:, layers]).mean(dim=(1, 2))
    return replace(look, maps=mean / mean.sum(dim=(1, 2), keepdim=True))


def corner_share(maps: torch.Tensor) -> torch.Tensor:
    """Share of attention to the image in its top-left cell, where Qwen-VL's sinks: [N, L, H, 14, 14] -> mean [L, H].

    Even attention gives 1/196.
    """
    return (maps[..., 0, 0] / maps.sum(dim=(-1, -2)).clamp_min(1e-9)).mean(dim=0)
