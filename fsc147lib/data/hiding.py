"""Hide cells of an image, with the dots in them: the model is then asked how many objects are left."""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .faults import DataError, need_category
from .samples import Sample

Fill = Literal["grey", "mean", "blur"]
"""Content of hidden cells: middle grey, the image's mean colour, or the image blurred until no object shows."""


def hide(sample: Sample, cells: np.ndarray, fill: Fill = "grey", category: str | None = None) -> Sample:
    """A copy of the sample with some cells of its image hidden, without the dots and boxes in them.

    Args:
        cells: [rows, columns] of a grid stretched over the image, True where hidden.
        category: category to count; None for the sample's own.

    Raises:
        DataError: `cells` is no grid, `fill` is unknown, or a question cannot hold the category.
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
    """Whether each point lies in a cell that is True: [..., N] bool.

    `cells` [..., rows, columns] bool is a grid stretched over an image of `size` (height, width), `points` [N, 2] are
    x, y in its pixels.  A point outside the image belongs to the nearest cell.
    """
    rows, columns = cells.shape[-2:]
    x, y = (points * [columns, rows] / size[::-1]).astype(np.int64).T
    return cells[..., y.clip(0, rows - 1), x.clip(0, columns - 1)]


def hide_cells(image: torch.Tensor, cells: torch.Tensor, fill: Fill) -> torch.Tensor:
    """Copies [N, H, W, 3] of an image [H, W, 3] uint8, each with the cells hidden that are True in `cells`.

    `cells` is [N, rows, columns] bool.  A pixel belongs to the cell of its centre.
    """
    y, x = (
        (2 * torch.arange(length, device=image.device) + 1) * n // (2 * length)
        for length, n in zip(image.shape, cells.shape[1:], strict=False)
    )
    colours = image.permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    if fill == "grey":
        filling = image.new_full((3,), 127)
    elif fill == "mean":
        filling = colours.mean(dim=(0, 2, 3)).round().to(image.dtype)
    else:
        coarse = F.interpolate(colours, (7, 7), mode="area")  # too coarse to show an object
        filling = F.interpolate(coarse, image.shape[:2], mode="bilinear")[0].permute(1, 2, 0).round().to(image.dtype)
    return torch.where(cells[:, y][:, :, x, None], filling, image)
