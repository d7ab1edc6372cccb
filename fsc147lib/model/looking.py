"""`look`: where a model's attention goes on some samples, layer by layer and head by head, and on whose answer.

A map is that of an answer: of the true one, as in training, or of what the model says of its own.

Left out: how a map is made (`heatmaps`), and whether it is right (`evaluation`).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from tqdm import tqdm

from ..data import Sample
from .answers import own_answers
from .collate import Batch, Collate, to_device
from .device import make_accelerator
from .forward import answer_logits
from .heatmaps import choose_layers, layer_head_maps
from .network import CountingModel
from .pixels import PixelStore
from .prompt import parse_count


@dataclass
class Look:
    """Maps of some samples, and the answers during which they were seen.

    Attributes:
        maps: [N, L, H, 14, 14] attention mass of every layer and head, or a mean [N, 14, 14].
        answers: what was said of each, for example "COUNT: 12".
        whose: the model's "own" answers, or the "true" ones.
    """

    maps: torch.Tensor
    answers: list[str]
    whose: Literal["own", "true"]

    @property
    def titles(self) -> list[str]:
        """For example "own answer 12"; an answer without a number in its own words."""
        return [map_title(answer, self.whose) for answer in self.answers]

    def __getitem__(self, rows) -> "Look":
        """Some samples' maps: a list or slice of their places."""
        places = range(len(self.answers))[rows] if isinstance(rows, slice) else list(rows)
        return Look(self.maps[list(places)], [self.answers[i] for i in places], self.whose)


def map_title(answer: str, whose: str) -> str:
    """How a figure names the answer that a map belongs to."""
    count = parse_count(answer)
    short = answer if len(answer) <= 20 else answer[:19] + "…"
    return f"{whose} answer {repr(short) if count is None else count}"


@torch.no_grad()
def look(
    model: CountingModel,
    samples: list[Sample],
    layers: tuple[int, ...] | None = None,
    batch_size: int = 16,
    answer: Literal["own", "true"] = "own",
) -> Look:
    """Where a model's attention goes on some samples while it answers.

    Args:
        model: is moved to this machine's accelerator, if it has one, and put in eval mode.
        samples: with images.
        layers: None for `default_layers`.
        answer: "own": the digits are those that the model says (all tokens of an answer that has none); "true":
            those of the true count, as in training and in `evaluate`.

    Returns:
        Maps float32 on the CPU, with the answers.
    """
    accelerator = make_accelerator("auto")
    network = model.network.to(accelerator.device).eval()
    layers = choose_layers(network, layers)
    collate = Collate(model.tokenizer, model.image_processor, PixelStore(samples, model.image_processor))
    maps, answers = [], []
    for start in tqdm(range(0, len(samples), batch_size), desc="look", leave=False):
        chunk = samples[start : start + batch_size]
        batch = to_device(collate(chunk), accelerator.device)
        with accelerator.autocast():
            if answer == "own":
                batch = answered_by_itself(model, chunk, batch, collate)
            _, trace = answer_logits(network, batch, rows_of=layers)
        maps.append(layer_head_maps(trace, batch, layers).float().cpu())
        answers += answer_texts(model, batch)
    return Look(torch.cat(maps), answers, answer)


def answered_by_itself(model: CountingModel, samples: list[Sample], batch: Batch, collate: Collate) -> Batch:
    """The batch of these samples with the model's own answers in place of the true ones."""
    answers, _, _ = own_answers(model, batch)
    return to_device(collate(samples, answers), batch["input_ids"].device)


def answer_texts(model: CountingModel, batch: Batch) -> list[str]:
    """The answers that a batch holds."""
    ids = [[token for token in row if token >= 0] for row in batch["answer_labels"].tolist()]
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def mean_map(look: Look, layers: list[int] | None = None) -> Look:
    """The `attention` heatmaps [N, 14, 14], each summing to 1, of what was looked at.

    Args:
        layers: places of some layers among those looked at; None for all.
    """
    maps = look.maps if layers is None else look.maps[:, layers]
    mean = maps.mean(dim=(1, 2))
    return replace(look, maps=mean / mean.sum(dim=(1, 2), keepdim=True))


def corner_share(maps: torch.Tensor) -> torch.Tensor:
    """How much of each head's attention to the image lies in the top-left cell: [N, L, H, 14, 14] -> mean [L, H].

    Even attention would give 1/196.  Qwen-VL is known to let attention sink there.
    """
    return (maps[..., 0, 0] / maps.sum(dim=(-1, -2)).clamp_min(1e-9)).mean(dim=0)
