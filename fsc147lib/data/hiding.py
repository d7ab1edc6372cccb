"""Cells of a picture hidden, so that one can ask again: the picture without them, and the dots that are left.

Left out: asking (`model.occlusion`).
"""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .faults import DataError, need_category
from .samples import Sample

Fill = Literal["grey", "mean", "blur"]
"""What stands in hidden cells: middle grey, the picture's mean colour, or the picture blurred beyond recognition."""

BLUR_GRID = 7  # a blurred picture is the smooth surface through so many by so many mean colours


def hide(sample: Sample, cells: np.ndarray, fill: Fill = "grey", category: str | None = None) -> Sample:
    """The sample with some cells of its picture hidden, and without the dots and boxes in them.

    Args:
        sample: with an image.
        cells: [rows, columns] True where hidden; any grid stretched over the image, 14x14 for a heatmap's cells.
        category: what to count in it; None for what was counted in the sample.

    Returns:
        A sample whose image lies in memory; a dot outside the image belongs to the nearest cell, a box to that
        of its centre.

    Raises:
        DataError: the cells are no grid, or the category or the fill is not known.
    """
    category = need_category(sample.category if category is None else category)
    if fill not in get_args(Fill):
        raise DataError(f"fill is {fill!r:.40}: choose one of {', '.join(get_args(Fill))}")
    cells = np.asarray(cells, dtype=bool)
    if cells.ndim != 2 or not cells.size:
        raise DataError(f"cells has shape {cells.shape}: give a grid such as 14 x 14, True where hidden")
    image = torch.from_numpy(np.array(sample.image))
    hidden = Image.fromarray(hide_cells(image, torch.from_numpy(cells)[None], fill)[0].numpy())
    points = sample.points[~covers(cells, sample.points, sample.size)]
    boxes = sample.boxes[~covers(cells, (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2, sample.size)]
    return Sample(sample.name, category, points, boxes, sample.image_path, in_memory=hidden)


def covers(cells: np.ndarray, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether each point [N, 2] x, y of an image of `size` (height, width) pixels lies in a cell that is True.

    `cells` [..., rows, columns] bool -> [..., N] bool.
    """
    rows, columns = cells.shape[-2:]
    x, y = (points * [columns, rows] / size[::-1]).astype(np.int64).T
    return cells[..., y.clip(0, rows - 1), x.clip(0, columns - 1)]


def hide_cells(image: torch.Tensor, cells: torch.Tensor, fill: Fill) -> torch.Tensor:
    """A picture [H, W, 3] uint8 once for each choice of hidden cells, [N, H, W, 3].

    `cells` [N, rows, columns] bool is a grid stretched over it; a pixel belongs to the cell of its centre.
    """
    y, x = (
        (2 * torch.arange(length, device=image.device) + 1) * n // (2 * length)
        for length, n in zip(image.shape, cells.shape[1:], strict=False)
    )
    return torch.where(cells[:, y][:, :, x, None], _filling(image, fill), image)


def _filling(image: torch.Tensor, fill: Fill) -> torch.Tensor:
    """What hides: [3] or [H, W, 3] uint8."""
    if fill == "grey":
        return image.new_full((3,), 127)
    colours = image.permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    if fill == "mean":
        return colours.mean(dim=(0, 2, 3)).round().to(image.dtype)
    coarse = F.interpolate(colours, (BLUR_GRID, BLUR_GRID), mode="area")
    smooth = F.interpolate(coarse, image.shape[:2], mode="bilinear")
    return smooth[0].permute(1, 2, 0).round().to(image.dtype)
