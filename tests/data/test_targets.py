import numpy as np
import pytest

from fsc147lib.data.targets import density_map, gaussian_window, resample_map, target_heatmap

SIZE = (384, 576)


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform((0, 0), (576, 384), (40, 2)).astype(np.float32)


def by_hand(points, size):
    """The density dot by dot and pixel by pixel, from its definition in the paper."""
    n = len(points)
    nearest = [min(np.hypot(*(points[i] - points[j])) for j in range(n) if j != i) for i in range(n)]
    window = float(np.mean(nearest))
    total = np.zeros(size)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for px, py in points.astype(float):
        inside = (np.abs(x - px) <= window / 2) & (np.abs(y - py) <= window / 2)
        bump = np.where(inside, np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (window / 4) ** 2)), 0)
        total += bump / bump.sum()
    return total


def test_density_is_the_papers(points):
    np.testing.assert_allclose(density_map(points, SIZE), by_hand(points, SIZE), atol=1e-6)


@pytest.mark.parametrize(
    "extra",
    [[[0, 0]], [[576, 384]], [[575.9, 200], [0.01, 383.9]], [[577.3, 100]], [[-3, 390]], [[100, 100]] * 5],
    ids=["corner", "far corner", "borders", "beyond the right border", "outside twice", "coinciding"],
)
@pytest.mark.parametrize("number", [0, 1, 40, 3701])
def test_density_sums_to_the_count(extra, number):
    points = np.concatenate([np.random.default_rng(1).uniform((0, 0), (576, 384), (number, 2)), extra])
    assert density_map(points, SIZE).sum() == pytest.approx(len(points), rel=1e-6)
    assert target_heatmap(points, SIZE).sum(dtype=float) == pytest.approx(1, abs=1e-6)


def test_no_dots():
    heatmap = target_heatmap(np.zeros((0, 2)), SIZE)
    assert heatmap.shape == (14, 14) and heatmap.dtype == np.float32 and not heatmap.any()


@pytest.mark.parametrize("size", [(384, 576), (384, 256), (700, 384), (31, 57)])
def test_target_is_the_density_on_the_coarse_grid(size):
    points = np.random.default_rng(2).uniform((0, 0), size[::-1], (30, 2))
    coarse = resample_map(density_map(points, size).astype(np.float64), (14, 14))
    np.testing.assert_allclose(target_heatmap(points, size), coarse / coarse.sum(), atol=1e-7)


@pytest.mark.parametrize("grid", [(12, 18), (31, 12), (7, 14), (1, 1)])
@pytest.mark.parametrize("back", [False, True], ids=["to 14x14", "from 14x14"])
def test_one_hot_maps_keep_mass_and_place(grid, back):
    """As 2,000 samples of the cell along each axis have it."""
    source, goal = ((14, 14), grid) if back else (grid, (14, 14))
    for y, x in [(0, 0), (source[0] // 2, source[1] // 2), (source[0] - 1, source[1] - 1)]:
        one_hot, parts = np.zeros(source), []
        one_hot[y, x] = 1
        for cell, n_in, n_out in zip((y, x), source, goal, strict=True):
            places = (cell + (np.arange(2000) + 0.5) / 2000) / n_in * n_out
            parts.append(np.bincount(places.astype(int), minlength=n_out) / 2000)
        moved = resample_map(one_hot, goal)
        np.testing.assert_allclose(moved, np.outer(*parts), atol=2e-3)
        assert moved.sum() == pytest.approx(1)


@pytest.mark.medium
def test_nearest_neighbours_of_200_000_dots():
    """A lattice whose steps are 3 and 5: each dot's nearest is 3 away.  All distances at once would be 160 GB."""
    x, y = np.meshgrid(np.arange(1000) * 3.0, np.arange(200) * 5.0)
    lattice = np.random.default_rng(0).permutation(np.stack([x.ravel(), y.ravel()], axis=1))
    assert gaussian_window(lattice, SIZE) == pytest.approx(3)
    lattice[:50_000] = lattice[0]  # and many on one place
    assert gaussian_window(lattice[:50_000], SIZE) == 2  # the least
    target = target_heatmap(lattice / [10, 10], (100, 300))
    assert target.sum() == pytest.approx(1, abs=1e-4)
    few = lattice[:5000] / [10, 10]  # more than are in memory at once: as the sum of their density on each cell
    expected = resample_map(density_map(few, (100, 300)), (14, 14)) / 5000
    np.testing.assert_allclose(target_heatmap(few, (100, 300)), expected, atol=1e-6)
