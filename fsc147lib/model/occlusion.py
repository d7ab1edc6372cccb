"""Hide a part of a picture and ask again: what the model counts without it.

Left out: hiding itself (`data.hiding`).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ..data import Fill, Picture, Sample, hide
from .network import CountingModel
from .prediction import Prediction, predict_samples


def count_without(
    model: CountingModel,
    image_or_sample: str | Path | Image.Image | Sample,
    cells: np.ndarray,
    fill: Fill = "grey",
    category: str | None = None,
) -> Prediction:
    """Hide cells of a picture and count again.

    Args:
        model: as in `predict`.
        image_or_sample: a file, an image in memory, or a sample.
        cells: [14, 14] bool, True where hidden; any other grid over the picture will do.
        fill: what stands there instead: middle "grey", the picture's "mean" colour, or its "blur".
        category: what to count; of a sample None for its own.

    Returns:
        Its `sample` is the picture that the model saw, with the dots that are left.

    Raises:
        DataError: the picture, the category, the cells or the fill cannot be used.
    """
    sample = image_or_sample
    if not isinstance(sample, Sample):
        sample = Picture(sample, category or "")
    return predict_samples(model, [hide(sample, cells, fill, category)])[0]
