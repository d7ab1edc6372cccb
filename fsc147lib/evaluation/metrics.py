"""Numbers: how far counts are off, whether two runs differ, how well a heatmap lies on the objects, and whether
probabilities of counts can be believed.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..data import kl_divergence
from ..model import Prediction

ABSURD = 10  # times the largest count in training: an answer above that is absurd
BINS = ((0, 0), (1, 20), (21, 50), (51, 100), (101, 200), (201, None))  # true counts, both ends included


def absolute_errors(predicted, target, empty_cost: float | None = None) -> np.ndarray:
    """How far each count is off, [N] float64 in objects; an answer without a number is never scored as right.

    Args:
        predicted: [N] counts; None or NaN where the answer does not parse.  That costs the true count.
        target: [N] true counts, at least 0.
        empty_cost: what it costs on an empty scene, at least 1: the mean count of the training images; None for
            the mean of `target`.

    Raises:
        ValueError: lengths differ, there is nothing to measure, or a target is no count.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if predicted.shape != target.shape or target.ndim != 1 or len(target) == 0:
        raise ValueError(f"predicted and target must be equally long lists, got {predicted.shape} and {target.shape}")
    if not target.min() >= 0:
        raise ValueError(f"target {int(target.argmin())} is {target.min():g}: a true count is at least 0")
    empty_cost = max(1.0, float(target.mean() if empty_cost is None else empty_cost))
    return np.where(np.isnan(predicted), np.where(target > 0, target, empty_cost), np.abs(predicted - target))


def counting_metrics(predicted, target, empty_cost: float | None = None) -> dict[str, float | None]:
    """Errors of predicted counts, as in Ranjan et al. and the crowd-counting literature, and how many are right.

    Args and errors are those of `absolute_errors`.

    Returns:
        `mae`, `rmse` and `median_error` in objects; `nae`, the mean error relative to the target, and `sre`, the root
        of the mean squared error relative to the target, both over the images with objects and None without any;
        `exact`, `within_1` and `within_10_percent`, the parts of all images (0..1) so close to the target.
    """
    error = absolute_errors(predicted, target, empty_cost)
    target, parsed = np.asarray(target), ~np.isnan(np.asarray(predicted, dtype=np.float64))
    seen, counts = error[target > 0], target[target > 0]
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "median_error": float(np.median(error)),
        "nae": float((seen / counts).mean()) if len(seen) else None,
        "sre": float(np.sqrt((seen**2 / counts).mean())) if len(seen) else None,
        "exact": float((parsed & (error == 0)).mean()),
        "within_1": float((parsed & (error <= 1)).mean()),
        "within_10_percent": float((parsed & (10 * error <= target)).mean()),
    }


def absurd_answers(predicted, target, empty_cost: float | None, training_counts: Sequence[int]) -> dict:
    """How many answers are beyond reason, and the mean error without them: one answer of 25081 hides all the others.

    Args:
        training_counts: of the training images; the others are those of `absolute_errors`.

    Returns:
        `absurd`, the number of answers above ABSURD times the largest training count; `mae_without_absurd`, the
        mean error of the other images in objects, None where there is no other.  Nothing where no training count is
        above 0.
    """
    error, largest = absolute_errors(predicted, target, empty_cost), max(training_counts, default=0)
    if not largest:
        return {}
    absurd = np.asarray(predicted, dtype=np.float64) > ABSURD * largest  # [N]; False of an answer without a number
    others = error[~absurd]
    return {"absurd": int(absurd.sum()), "mae_without_absurd": float(others.mean()) if len(others) else None}


def metrics_by_bin(predicted, target, empty_cost: float | None = None) -> dict[str, dict[str, float | None]]:
    """`counting_metrics` of each of BINS that has images, their number and the rate of unparsed answers, by its name.

    For example {"21-50": {"images": 12, "unparsed": 0.25, "mae": ...}}.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target)
    empty_cost = target.mean() if empty_cost is None else empty_cost  # of all, not of the bin
    result = {}
    for low, high in BINS:
        chosen = (target >= low) & (target <= (np.inf if high is None else high))
        if chosen.any():
            name = f"{low}+" if high is None else f"{low}-{high}" if low < high else f"{low}"
            unparsed = float(np.isnan(predicted[chosen]).mean())
            errors = counting_metrics(predicted[chosen], target[chosen], empty_cost)
            result[name] = {"images": int(chosen.sum()), "unparsed": unparsed, **errors}
    return result


def constant_baselines(training_counts, target) -> dict[str, dict[str, float | None]]:
    """What a model that never looks achieves: always the training mean, or always its median."""
    constants = {"mean": float(np.mean(training_counts)), "median": float(np.median(training_counts))}
    return {k: {"constant": v, **counting_metrics(np.full(len(target), v), target)} for k, v in constants.items()}


def answer_histogram(predicted, target) -> dict[int, tuple[int, int]]:
    """How often each number is true and how often it is predicted: shows what answers cluster on.

    Returns:
        Number: (times true, times predicted), ascending, of all that are either; without unparsed answers (None).
    """
    true, answered = Counter(map(int, target)), Counter(int(number) for number in predicted if number is not None)
    return {number: (true[number], answered[number]) for number in sorted(true.keys() | answered.keys())}


def bootstrap_interval(values, statistic: Callable = np.mean, draws: int = 2000) -> tuple[float, float, float]:
    """A statistic of a sample with its 95 % percentile bootstrap interval (Efron, 1979).

    Args:
        values: [N], or [R, N] of R runs on the same N images: then runs and images are both drawn anew
            (Owen, "The pigeonhole bootstrap", 2007).  Over a few runs the interval is somewhat narrow.
        statistic: of an array to a number.

    Returns:
        Low end, the statistic of `values`, high end; the same on every call.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    drawn = [statistic(values[np.ix_(*(rng.integers(0, n, n) for n in values.shape))]) for _ in range(draws)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(statistic(values)), float(high)


def paired_difference(first, second, draws: int = 2000) -> tuple[float, float, float]:
    """By how much errors of one model are above another's on the same images: the mean of `first - second`.

    Args:
        first, second: `absolute_errors` [N] of the same images in the same order, or [R, N] of R runs each, run by
            run with the same seed; a ValueError where their shapes differ.

    Returns:
        Low end of the 95 % interval, mean difference, high end.  An interval above 0: `second` is better.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"errors of the same images and runs are wanted, got {first.shape} and {second.shape}")
    return bootstrap_interval(first - second, np.mean, draws)


def alignment(heatmap: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well each heatmap A lies on its target P: [B, 14, 14], each non-negative and summing to 1.

    Cells with objects are those whose share of the objects is at least the average, 1 / cells.

    Returns:
        [B] each: `kl`, KL(P || A) in nats, 0 is perfect; `mass_on_objects`, the part of A on cells with
        objects, 0..1; `pearson`, correlation over cells, -1..1, 0 for a constant map; `pointing`, 1 where
        the largest cell of A has objects (the pointing game of Zhang et al., ECCV 2016), else 0.  All are NaN
        for an empty scene, whose target is zeros.
    """
    a, p = heatmap.flatten(1).float(), target.flatten(1).float()  # [B, 196]
    on_objects = p >= 1 / p.shape[1]
    measures = {
        "kl": kl_divergence(target, heatmap),
        "mass_on_objects": (a * on_objects).sum(dim=1),
        "pearson": correlation(a, p),
        "pointing": on_objects.gather(1, a.argmax(dim=1, keepdim=True))[:, 0].float(),
    }
    defined = (p > 0).any(dim=1)
    return {name: torch.where(defined, values, torch.nan) for name, values in measures.items()}


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Pearson's, of each pair of rows [B, N]: [B], -1..1; 0 where one of them is constant."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (first, second))
    scale = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(scale > 0, (a * b).sum(dim=1) / scale.clamp_min(1e-12), 0.0)


def calibration(
    predictions: Sequence[Prediction], counts: Sequence[int], levels: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
) -> list[dict]:
    """How often true counts lie in the predictions' central intervals that are to hold so much probability.

    Returns:
        For each level: `level`; `claimed`, the mean probability of the intervals, which end at whole numbers and so
        hold somewhat more; `inside`, how often the truth lies in them, with `low` and `high`, its 95 % bootstrap
        interval; `width`, the mean of how many numbers they span.  `inside` below `claimed`: it is too sure.
    """
    rows = []
    for level in levels:
        ends = [prediction.interval(level) for prediction in predictions]
        held = [p.distribution[low : high + 1].sum() for p, (low, high) in zip(predictions, ends, strict=True)]
        inside = [low <= count <= high for count, (low, high) in zip(counts, ends, strict=True)]
        low, rate, high = bootstrap_interval(inside)
        width = float(np.mean([high - low + 1 for low, high in ends]))
        row = {"level": level, "claimed": float(np.mean(held)), "inside": rate, "low": low, "high": high}
        rows.append({**row, "width": width})
    return rows
