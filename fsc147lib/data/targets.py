"""Dots to density to target heatmap, maps from one grid to another, and the divergence between two maps.

The density follows Ranjan et al., "Learning To Count Everything" (CVPR 2021): a Gaussian on each dot, in a square
window as wide as the image's mean nearest-neighbour distance, with a standard deviation of a quarter of that width.
A Gaussian is the product of a row profile and a column profile, so a density map is a matrix product.
"""

import numpy as np
import torch
from scipy.spatial import KDTree

GRID = 14  # rows and columns of the target heatmap
TINY_MASS = 1e-8  # floor under a heatmap's cells inside the logarithm of the KL divergence
LONE_WINDOW = 0.25  # of the image's shorter side: the window of a dot without a neighbour
MIN_WINDOW = 2.0  # pixels: dots may coincide, and a window must hold at least one pixel centre
CHUNK = 4096  # dots whose Gaussians are in memory at once; FSC147's largest count is 3,701


def gaussian_window(points: np.ndarray, size: tuple[int, int]) -> float:
    """The width in pixels of each Gaussian's window: the mean distance from a dot [N, 2] to its nearest neighbour.

    The width is at least 2.  For fewer than two dots it is a quarter of the shorter side of `size` (height, width).
    """
    if len(points) < 2:
        return max(LONE_WINDOW * min(size), MIN_WINDOW)
    places, times = np.unique(np.float32(points), axis=0, return_counts=True)
    distances = KDTree(places).query(places, k=[2])[0][:, 0]  # the nearest is the place itself
    distances[times > 1] = 0
    return max(float(np.average(distances, weights=times)), MIN_WINDOW)


def _profiles(centres: np.ndarray, length: int, window: float) -> np.ndarray:
    """[N, length] truncated Gaussians around N centres on an axis, each scaled to sum 1 within the image.

    Centres outside the image are moved to its border.
    """
    centres = np.clip(np.asarray(centres, dtype=np.float64), 0, length)[:, None]
    offsets = np.arange(length) + 0.5 - centres  # [N, length], from the dot to each pixel's centre
    profile = np.exp(-0.5 * (offsets / (window / 4)) ** 2)
    profile[np.abs(offsets) > window / 2] = 0
    return profile / profile.sum(axis=1, keepdims=True)


def density_map(points: np.ndarray, size: tuple[int, int], grid: tuple[int, int] | None = None) -> np.ndarray:
    """The density of dots [N, 2] x, y in pixels, on an image of `size` (height, width): float64, summing to N.

    Returns objects per pixel [height, width], or objects per cell [rows, columns] of a `grid` stretched over the
    image.  Dots outside the image count on its border.
    """
    points = np.asarray(points).reshape(-1, 2)
    window, total = gaussian_window(points, size), np.zeros(grid or size)
    for start in range(0, len(points), CHUNK):
        x, y = points[start : start + CHUNK].T
        rows, columns = _profiles(y, size[0], window), _profiles(x, size[1], window)
        if grid:
            rows, columns = rows @ area_weights(size[0], grid[0]).T, columns @ area_weights(size[1], grid[1]).T
        total += rows.T @ columns
    return total


def target_heatmap(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The density on a 14x14 grid stretched over the image, scaled to sum 1: float32, all zeros without a dot."""
    return (density_map(points, size, (GRID, GRID)) / max(1, len(points))).astype(np.float32)


def area_weights(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] fraction of each input cell's length that lies in each output cell, on one common axis.

    Columns sum to 1, so the product with a vector of masses keeps its sum.
    """
    edges_in, edges_out = np.arange(n_in + 1) / n_in, np.arange(n_out + 1) / n_out
    right = np.minimum(edges_out[1:, None], edges_in[None, 1:])
    left = np.maximum(edges_out[:-1, None], edges_in[None, :-1])
    return np.clip(right - left, 0, None) * n_in


def resample_map(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Move a map of masses [..., h, w] to another grid [..., rows, columns] by overlapping areas; its sum stays."""
    rows, columns = area_weights(values.shape[-2], grid[0]), area_weights(values.shape[-1], grid[1])
    return rows @ values @ columns.T


def kl_divergence(target: torch.Tensor, heatmap: torch.Tensor) -> torch.Tensor:
    """KL(P || A) in nats of targets P and heatmaps A, both [B, 14, 14] and summing to 1: [B], 0 for a P of zeros."""
    target, heatmap = target.float(), heatmap.float()
    return (torch.xlogy(target, target) - target * heatmap.clamp_min(TINY_MASS).log()).sum(dim=(1, 2))


def centre_blob(target: torch.Tensor, spread: float = 1 / 8) -> torch.Tensor:
    """A Gaussian in the middle of a map, summing to 1, in the shape of `target` [B, 14, 14].

    `spread` is its standard deviation, as a fraction of the map's side.
    """
    cells = torch.arange(target.shape[-1], device=target.device, dtype=target.dtype)
    profile = torch.exp(-0.5 * ((cells - cells.mean()) / (len(cells) * spread)) ** 2)
    return (profile[:, None] * profile / profile.sum() ** 2).expand_as(target)
