"""Hide a part of a picture and ask again: what the model counts without it, and how sure of its answer it stays.

Slow, for the whole network sees each hidden part anew; but it uses no gradient and no attention, so the other
heatmaps can be held against it.

Left out: hiding itself (`data.hiding`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from ..data import GRID, Fill, Sample
from ..data.hiding import covers, hide_cells
from ..options import ConfigError
from .answers import digits_score
from .collate import Batch, select_rows
from .counts import count_log_probabilities, number_tokens
from .device import make_accelerator
from .forward import answer_logits
from .heatmaps import Heatmap, register
from .looking import answer_texts, answered_batches
from .network import CountingModel
from .pixels import from_patches, to_patches

WINDOW = 2
"""Rows and columns of cells that are hidden at once."""

AT_ONCE = 16
"""Hidden pictures in a batch."""


def windows(size: int = WINDOW, step: int | None = None) -> torch.Tensor:
    """Square windows of `size` cells a side over the 14x14 grid, row by row: [W, 14, 14] bool.

    From one to the next are `step` cells, None for windows side by side; the last ones end with the grid.
    """
    starts = sorted({*range(0, GRID - size, step or size), GRID - size})
    covered = torch.zeros(len(starts), GRID, dtype=torch.bool)
    for row, start in zip(covered, starts, strict=True):
        row[start : start + size] = True
    return (covered[:, None, :, None] & covered[None, :, None, :]).flatten(0, 1)


def hide_in_batch(network, batch: Batch, row: int, cells: torch.Tensor, fill: Fill) -> Iterator[Batch]:
    """One image of a batch and its answer, once for each choice of hidden cells [N, rows, columns], AT_ONCE in a batch.

    The cells are those of the picture as the network gets it.  A ConfigError where the batch has no pixels.
    """
    if "pixel_values" not in batch:
        raise ConfigError("occlusion hides pixels, and this batch brings kept image features: use it without a cache")
    patch, merge = network.config.vision_config.patch_size, network.config.vision_config.spatial_merge_size
    one = select_rows(batch, [row])
    image = from_patches(one["pixel_values"], one["image_sizes"][0][1], patch, merge)
    for chosen in cells.to(image.device).split(AT_ONCE):
        pixels = torch.cat([to_patches(picture, patch, merge) for picture in hide_cells(image, chosen, fill)])
        yield cast(Batch, {**select_rows(one, [0] * len(chosen)), "pixel_values": pixels})


@torch.no_grad()
def hidden_log_probabilities(
    network, batch: Batch, cells: list[torch.Tensor], fill: Fill = "grey", compiled: bool = False
) -> list[torch.Tensor]:
    """Log-probability of each image's answer (`digits_score`) when cells [N, rows, columns] of it are hidden: [N]."""

    def scores(row: int, choices: torch.Tensor) -> torch.Tensor:
        hidden = hide_in_batch(network, batch, row, choices, fill)
        return torch.cat([digits_score(answer_logits(network, one, compiled=compiled)[0], one) for one in hidden])

    return [scores(row, choices) for row, choices in enumerate(cells)]


def occlusion_mass(
    heatmap: Heatmap, batch: Batch, create_graph: bool, fill: Fill = "grey", window: int = WINDOW, **kwargs
):
    """How far the log-probability of the digits falls when a window of cells is hidden, 0 where it rises.

    A cell has the mean of the windows that cover it (Zeiler and Fergus, "Visualizing and Understanding
    Convolutional Networks", ECCV 2014).  To hide otherwise, register `partial(occlusion_mass, fill="blur", window=4)`.
    """
    logits, trace = answer_logits(heatmap.network, batch, **kwargs)
    hidden = windows(window)
    without = hidden_log_probabilities(heatmap.network, batch, [hidden] * len(logits), fill, heatmap.compiled)
    falls = digits_score(logits, batch)[:, None] - torch.stack(without)  # [B, W]
    covered = hidden.flatten(1).to(falls)
    mass = falls.clamp_min(0) @ covered / covered.sum(dim=0)
    return logits, mass.unflatten(1, (GRID, GRID)) + torch.finfo(mass.dtype).tiny, trace


register("occlusion", occlusion_mass, trainable=False)


@dataclass
class Occlusion:
    """What happened when each of W windows of each of N pictures was hidden."""

    windows: np.ndarray  # [W, 14, 14] bool
    log_probability: np.ndarray  # [N, W] by how much that of the answer's digits fell, in nats
    count: np.ndarray  # [N, W] by how much the expected count fell, in objects; NaN where an answer is not "COUNT: ..."
    objects: np.ndarray  # [N, W] dots under the window
    answers: list[str]  # to the whole pictures


@torch.no_grad()
def occlude(
    model: CountingModel, samples: list[Sample], window: int = WINDOW, step: int | None = None, fill: Fill = "grey"
) -> Occlusion:
    """Hide window after window of each picture: what becomes of the model's own answer, and of the expected count?

    `window` and `step` are those of `windows`, `fill` that of `hide`.
    """
    accelerator = make_accelerator("auto")
    hidden = windows(window, step)
    whole_first = torch.cat([torch.zeros_like(hidden[:1]), hidden])
    scores, answers = [], []
    for batch in answered_batches(model, samples, accelerator, 1):
        parts = hide_in_batch(model.network, batch, 0, whole_first, fill)
        with accelerator.autocast():
            scores.append(torch.cat([_log_probability_and_count(model, part) for part in parts]))
        answers += answer_texts(model, batch)
    found = torch.stack(scores).numpy()  # [N, 1 + W, 2]
    falls = found[:, :1] - found[:, 1:]
    objects = [covers(hidden.numpy(), sample.points, sample.size).sum(axis=1) for sample in samples]
    return Occlusion(hidden.numpy(), falls[..., 0], falls[..., 1], np.stack(objects), answers)


def _log_probability_and_count(model: CountingModel, batch: Batch) -> torch.Tensor:
    """Log-probability of each answer, and the expected count: [B, 2] float64 on the CPU."""
    logits, trace = answer_logits(model.network, batch, keep_keys=True)
    score = digits_score(logits, batch).double().cpu()
    prefix, _ = number_tokens(model.tokenizer)
    if batch["answer_labels"][0, : len(prefix)].tolist() != prefix:
        return torch.stack([score, torch.full_like(score, torch.nan)], dim=1)
    log_p, _ = count_log_probabilities(model, batch, logits, trace.keys_values)
    counts = log_p.softmax(dim=1)
    return torch.stack([score, counts @ torch.arange(counts.shape[1], dtype=counts.dtype)], dim=1)
