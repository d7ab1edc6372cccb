"""A baseline that must fail: counts from colours and edges alone, by ridge regression.

If it does well on a data set, the pictures give the count away without anybody looking at objects.
"""

from collections.abc import Sequence

import numpy as np

from ..data import Sample

BINS = 6  # of the colour histogram along each of red, green and blue
ORIENTATIONS = 8
EDGES = (6, 16, 40)  # grey levels a pixel above which a gradient is an edge, from faint to strong
STRENGTHS = 10.0 ** np.arange(-1, 6)  # of the regularisation


def ridge_baseline(train: Sequence[Sample], val: Sequence[Sample]) -> dict[str, float]:
    """Count the samples of `val` by what is known of `train` (at least 10) about colours, edges and names.

    The strength of the regularisation is chosen on the last fifth of `train`.

    Returns:
        Mean absolute errors on `val`: "ridge"; "mean" and "median", of the constants that `train` gives.
    """
    words = sorted({word for sample in train for word in sample.category.split()})
    (x, y), (unseen, right) = (
        (np.stack([_features(sample, words) for sample in samples]), np.array([float(s.count) for s in samples]))
        for samples in (train, val)
    )
    part = len(y) * 4 // 5
    tried = [np.abs(_ridge(x[:part], y[:part], x[part:], strength) - y[part:]).mean() for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmin(tried))]
    counts = {"ridge": _ridge(x, y, unseen, best), "mean": y.mean(), "median": np.median(y)}
    return {name: float(np.abs(predicted - right).mean()) for name, predicted in counts.items()}


def _ridge(x: np.ndarray, y: np.ndarray, unseen: np.ndarray, strength: float) -> np.ndarray:
    """Counts [M], at least 0, of features [M, F], from [N, F] and their counts [N]."""
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, unseen = (x - mean) / spread, (unseen - mean) / spread
    weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return np.maximum(unseen @ weights + y.mean(), 0)


def _features(sample: Sample, words: list[str]) -> np.ndarray:
    """[F]: colour histogram, edge densities by orientation, and which of the words the category has."""
    pixels = np.asarray(sample.image)
    codes = (pixels.astype(int) * BINS // 256) @ [BINS * BINS, BINS, 1]
    colours = np.bincount(codes.ravel(), minlength=BINS**3)
    down, across = np.gradient(pixels.mean(axis=2))
    size, turn = np.hypot(down, across), np.arctan2(down, across) % np.pi
    sector = np.minimum((turn / np.pi * ORIENTATIONS).astype(int), ORIENTATIONS - 1).ravel()
    strong = [size, *(size > edge for edge in EDGES)]  # mean gradient, and the parts of pixels above each edge
    edges = [np.bincount(sector, layer.ravel().astype(float), ORIENTATIONS) for layer in strong]
    named = [float(word in sample.category.split()) for word in words]
    return np.concatenate([np.concatenate([colours, *edges]) / size.size, named])
