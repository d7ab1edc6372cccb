"""Occlusion: hide parts of a picture, one pass for each, and measure the fall of the answer's probability and count."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..data import GRID, Fill, Sample
from ..data.hiding import covers, hide_cells
from ..options import ConfigError
from .answers import answer_texts, count_log_probabilities, digits_score
from .collate import Batch, from_patches, select_rows, to_patches
from .device import choose_compute
from .forward import answer_logits, read_prompts
from .heatmaps import Heatmap, register
from .looking import answered_batches
from .network import CountingModel

WINDOW = 2  # rows and columns of cells that are hidden at once
AT_ONCE = 16  # hidden pictures in a batch


def windows(size: int = WINDOW, step: int | None = None) -> torch.Tensor:
    """Windows of size x size cells, `step` cells apart (None: side by side): [W, 14, 14] bool, True inside."""
    starts = sorted({*range(0, GRID - size, step or size), GRID - size})
    covered = torch.zeros(len(starts), GRID, dtype=torch.bool)
    for row, start in zip(covered, starts, strict=True):
        row[start : start + size] = True
    return (covered[:, None, :, None] & covered[None, :, None, :]).flatten(0, 1)


def hide_in_batch(network, batch: Batch, row: int, cells: torch.Tensor, fill: Fill) -> Iterator[Batch]:
    """Yield copies of an image of a batch, AT_ONCE together, one for each choice of hidden cells [N, rows, columns]."""
    if "pixel_values" not in batch:
        raise ConfigError("occlusion hides pixels, and this batch brings kept image features: use it without a cache")
    patch, merge = network.config.vision_config.patch_size, network.config.vision_config.spatial_merge_size
    one = select_rows(batch, [row])
    image = from_patches(one["pixel_values"], one["image_sizes"][0][1], patch, merge)
    for chosen in cells.to(image.device).split(AT_ONCE):
        pixels = torch.cat([to_patches(picture, patch, merge) for picture in hide_cells(image, chosen, fill)])
        yield {**select_rows(one, [0] * len(chosen)), "pixel_values": pixels}


@torch.no_grad()
def hidden_log_probabilities(
    network, batch: Batch, cells: list[torch.Tensor], fill: Fill = "grey"
) -> list[torch.Tensor]:
    """`digits_score` of each image of a batch for each choice of its hidden cells [N, rows, columns]: [N] each."""
    scores = []
    for row, choices in enumerate(cells):
        hidden = hide_in_batch(network, batch, row, choices, fill)
        scores.append(torch.cat([digits_score(answer_logits(network, one)[0], one) for one in hidden]))
    return scores


@register
class OcclusionMap(Heatmap):
    """Mean fall of the digits' log-probability over a cell's hidden windows, rises as 0 (Zeiler and Fergus, 2014)."""

    name, trainable = "occlusion", False
    fill: Fill = "grey"
    window = WINDOW

    def mass(self, batch, create_graph=False, prompts=None):
        logits, _ = answer_logits(self.network, batch)
        hidden = windows(self.window)
        without = hidden_log_probabilities(self.network, batch, [hidden] * len(logits), self.fill)
        falls = digits_score(logits, batch)[:, None] - torch.stack(without)  # [B, W]
        covered = hidden.flatten(1).to(falls)
        mass = falls.clamp_min(0) @ covered / covered.sum(dim=0)
        return logits, mass.unflatten(1, (GRID, GRID)) + torch.finfo(mass.dtype).tiny


@dataclass
class Occlusion:
    """Effects of hiding each of W windows of each of N pictures."""

    windows: np.ndarray  # [W, 14, 14] bool
    log_probability: np.ndarray  # [N, W] fall of the log-probability of the answer's digits, in nats
    count: np.ndarray  # [N, W] fall of the expected count, in objects
    objects: np.ndarray  # [N, W] dots under the window
    answers: list[str]  # to the whole pictures


@torch.no_grad()
def occlude(
    model: CountingModel, samples: list[Sample], window: int = WINDOW, step: int | None = None, fill: Fill = "grey"
) -> Occlusion:
    """Hide each window of each picture (see `windows`); measure the fall of its answer's probability and its count."""
    compute, hidden = choose_compute(), windows(window, step)
    whole_first = torch.cat([torch.zeros_like(hidden[:1]), hidden])
    scores, answers = [], []
    for batch, _ in answered_batches(model, samples, compute, 1):
        answers += answer_texts(model, batch)
        for part in hide_in_batch(model.network, batch, 0, whole_first, fill):
            with compute.autocast():
                prompts = read_prompts(model.network, part)
                score = digits_score(prompts.read_answers(part)[0], part).double().cpu()
                counts = count_log_probabilities(model, prompts)[0].softmax(dim=1)
            mean = counts @ torch.arange(counts.shape[1], dtype=counts.dtype)
            scores.append(torch.stack([score, mean], dim=1))
    found = torch.cat(scores).unflatten(0, (len(samples), -1)).numpy()  # [N, 1 + W, 2]
    falls = found[:, :1] - found[:, 1:]
    objects = [covers(hidden.numpy(), sample.points, sample.size).sum(axis=1) for sample in samples]
    return Occlusion(hidden.numpy(), falls[..., 0], falls[..., 1], np.stack(objects), answers)
