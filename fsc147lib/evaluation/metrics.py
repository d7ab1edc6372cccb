"""Metrics: errors of counts, intervals, alignment of heatmaps with targets, calibration of count distributions."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..data import kl_divergence
from ..model import Prediction
from ..model.prompt import MAX_DIGITS

ABSURD = 10  # an answer is absurd above this multiple of the largest training count
_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_WITH_DIGITS = r"[\w.,+-]*[0-9][\w.,+-]*"  # "37." and "1,234", and also "3.7" or "IMG2"
_MARKED = re.compile(rf"\bCOUNT\b\W*?({_WITH_DIGITS})", re.IGNORECASE)
_WHOLE = re.compile(r"[0-9]{1,3}(,[0-9]{3})+|[0-9]+")
BINS = ((0, 0), (1, 20), (21, 50), (51, 100), (101, 200), (201, None))  # true counts, both ends included


def parse_count_leniently(text: str, complete: bool = True) -> int | None:
    """The single whole number in an answer in any words, or None; numbers after "COUNT" go before others.

    Text within <think> is skipped, and a number may be repeated.  If the answer is not `complete`, a number at its end
    is not read, since it may lack digits.
    """
    text = _THOUGHT.sub("", text).rstrip()
    if not complete and re.search(rf"{_WITH_DIGITS}\Z", text):
        return None
    words = [word.strip(".,") for word in _MARKED.findall(text) or re.findall(_WITH_DIGITS, text)]
    numbers = {int(word.replace(",", "")) for word in words if _WHOLE.fullmatch(word)}
    return numbers.pop() if len(numbers) == 1 and max(numbers) < 10**MAX_DIGITS else None


def absolute_errors(predicted, target, empty_cost: float | None = None) -> np.ndarray:
    """Absolute error of each count, [N] float64 in objects.  An answer that does not parse costs the true count.

    Args:
        predicted: [N] counts; None or NaN for an answer that does not parse.
        target: [N] true counts, at least 0.
        empty_cost: error of an unparsed answer on an empty scene: the mean training count, or None for the mean of
            `target`.  The error is at least 1.

    Raises:
        ValueError: the lengths differ, the lists are empty, or a true count is negative or NaN.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if predicted.shape != target.shape or target.ndim != 1 or len(target) == 0:
        raise ValueError(f"predicted and target must be equally long lists, got {predicted.shape} and {target.shape}")
    if not target.min() >= 0:
        raise ValueError(f"target {int(target.argmin())} is {target.min():g}: a true count is at least 0")
    empty_cost = max(1.0, float(target.mean() if empty_cost is None else empty_cost))
    return np.where(np.isnan(predicted), np.where(target > 0, target, empty_cost), np.abs(predicted - target))


def counting_metrics(predicted, target, empty_cost: float | None = None) -> dict[str, float | None]:
    """Counting metrics of N images (Ranjan et al., CVPR 2021).

    Arguments and exceptions are those of `absolute_errors`.  An answer that does not parse has the true count as its
    error, or `empty_cost` where the true count is 0.

    Returns:
        `mae`, `rmse`, `median_error`: in objects.
        `nae`, mean of error / true count, and `sre`, root of the mean of error² / true count: over images with
        objects; None without any.
        `exact`, `within_1`, `within_10_percent`: share of images, 0..1, whose error is 0, at most 1, and at most 10 %
        of the true count; an unparsed answer is in none of them.
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
    """Absurd answers: those above ABSURD times the largest of `training_counts`.  One can dominate the MAE.

    Returns:
        `absurd`, the number of absurd answers, and `mae_without_absurd`, the MAE of the other images in objects (None
        without any).  An empty dict where no training count is above 0.
    """
    error, largest = absolute_errors(predicted, target, empty_cost), max(training_counts, default=0)
    if not largest:
        return {}
    absurd = np.asarray(predicted, dtype=np.float64) > ABSURD * largest  # [N]; False for NaN
    others = error[~absurd]
    return {"absurd": int(absurd.sum()), "mae_without_absurd": float(others.mean()) if len(others) else None}


def metrics_by_bin(predicted, target, empty_cost: float | None = None) -> dict[str, dict[str, float | None]]:
    """`counting_metrics` in bins of the true count, as {"21-50": {"images": 12, "unparsed": 0.25, "mae": ...}}.

    `images` is the number of images, `unparsed` their rate of unparsed answers; a bin without images is left out.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target)
    empty_cost = target.mean() if empty_cost is None else empty_cost  # over all bins
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
    """`counting_metrics` of a `constant` answer for each image: the mean, or the median, of the training counts."""
    constants = {"mean": float(np.mean(training_counts)), "median": float(np.median(training_counts))}
    return {k: {"constant": v, **counting_metrics(np.full(len(target), v), target)} for k, v in constants.items()}


def answer_histogram(predicted, target) -> dict[int, tuple[int, int]]:
    """Number -> (images with that true count, images with that answer), by rising number.

    None in `predicted`, an answer that does not parse, is skipped.
    """
    true, answered = Counter(map(int, target)), Counter(int(number) for number in predicted if number is not None)
    return {number: (true[number], answered[number]) for number in sorted(true.keys() | answered.keys())}


def bootstrap_interval(values, statistic: Callable = np.mean, draws: int = 2000) -> tuple[float, float, float]:
    """95 % percentile bootstrap interval of a statistic (Efron, 1979); the same on every call.

    Args:
        values: [N], or [R, N] of R runs on the same N images; then runs and images are both resampled (Owen, "The
            pigeonhole bootstrap", 2007).  With few runs the interval is somewhat too narrow.
        statistic: function of an array that returns a number.

    Returns:
        Low end of the interval, statistic of `values`, high end.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    drawn = [statistic(values[np.ix_(*(rng.integers(0, n, n) for n in values.shape))]) for _ in range(draws)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(statistic(values)), float(high)


def paired_difference(first, second, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of `first - second`, errors of two models on the same images, with its 95 % bootstrap interval.

    Args:
        first, second: `absolute_errors` [N] of the same images in the same order, or [R, N] of R runs each, paired by
            seed; a ValueError where the shapes differ.

    Returns:
        Low end, mean difference, high end.  An interval above 0 means that `second` has the smaller errors.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"errors of the same images and runs are wanted, got {first.shape} and {second.shape}")
    return bootstrap_interval(first - second, np.mean, draws)


def alignment(heatmap: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Agreement of heatmaps A with targets P, [B, 14, 14] each, non-negative with sum 1: [B] for each measure.

    A cell has objects where its P is at least the average, 1/196.  All measures are NaN where P is zeros (an empty
    scene).

    Returns:
        `kl`: KL(P || A) in nats; 0 is perfect.
        `mass_on_objects`: sum of A over the cells with objects, 0..1.
        `pearson`: correlation over cells, -1..1; 0 for a constant map.
        `pointing`: 1 where the largest cell of A has objects, else 0 (pointing game; Zhang et al., ECCV 2016).
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
    """Pearson's correlation of each pair of rows of [B, N]: [B], -1..1; 0 where a row is constant."""
    return F.cosine_similarity(*(rows - rows.mean(dim=1, keepdim=True) for rows in (first, second)))


def calibration(
    predictions: Sequence[Prediction], counts: Sequence[int], levels: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
) -> list[dict]:
    """Coverage of the predictions' central intervals at each level of probability.

    Returns:
        A row for each level: `level`; `claimed`, the mean probability that the intervals hold (above the level, for
        they end at whole numbers); `inside`, the share of true counts in their interval, with `low` and `high`, its
        95 % bootstrap interval; `width`, the mean number of counts in an interval.  `inside` below `claimed` means
        overconfidence.
    """
    rows = []
    for level in levels:
        ends = [prediction.interval(level) for prediction in predictions]
        held = [p.distribution[low : high + 1].sum() for p, (low, high) in zip(predictions, ends, strict=True)]
        inside = [low <= count <= high for count, (low, high) in zip(counts, ends, strict=True)]
        low, rate, high = bootstrap_interval(inside)
        row = {"level": level, "claimed": float(np.mean(held)), "inside": rate, "low": low, "high": high}
        rows.append({**row, "width": float(np.diff(ends).mean() + 1)})
    return rows
