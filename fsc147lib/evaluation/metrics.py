"""Numbers: how far counts are off, and how well a heatmap lies on the objects.

Left out: answering and averaging over a data set (`evaluate`).
"""

import numpy as np
import torch

from ..data.targets import kl_divergence

BINS = ((0, 20), (21, 50), (51, 100), (101, 200), (201, None))
"""Bounds of the true count, both included, by which errors are reported."""


def counting_metrics(predicted, target) -> dict[str, float]:
    """Errors of predicted counts, as in Ranjan et al. and the crowd-counting literature.

    Args:
        predicted, target: [N] counts; target >= 1.  An answer that does not parse goes in as 0.

    Returns:
        `mae` and `rmse` in objects; `nae`, the mean error relative to the target; `sre`, the root of the
        mean squared error relative to the target.

    Raises:
        ValueError: lengths differ, there is nothing to measure, or a target is below 1.
    """
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if predicted.shape != target.shape or target.ndim != 1 or len(target) == 0:
        raise ValueError(f"predicted and target must be equally long lists, got {predicted.shape} and {target.shape}")
    if target.min() < 1:
        raise ValueError(
            f"target {int(target.argmin())} is {target.min():g}: relative errors need counts of at least 1"
        )
    error = np.abs(predicted - target)
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "nae": float((error / target).mean()),
        "sre": float(np.sqrt((error**2 / target).mean())),
    }


def metrics_by_bin(predicted, target, unparsed) -> dict[str, dict[str, float]]:
    """`counting_metrics` of each of BINS that has images, with their number and the rate of unparsed answers.

    Args:
        predicted, target: [N] counts.
        unparsed: [N] booleans.

    Returns:
        For example {"21-50": {"images": 12, "unparsed": 0.25, "mae": ...}}.
    """
    predicted, target, unparsed = np.asarray(predicted), np.asarray(target), np.asarray(unparsed)
    result = {}
    for low, high in BINS:
        chosen = (target >= low) & (target <= (np.inf if high is None else high))
        if chosen.any():
            name = f"{low}+" if high is None else f"{low}-{high}"
            result[name] = {
                "images": int(chosen.sum()),
                "unparsed": float(unparsed[chosen].mean()),
                **counting_metrics(predicted[chosen], target[chosen]),
            }
    return result


def constant_baselines(training_counts, target) -> dict[str, dict[str, float]]:
    """What a model that never looks achieves: always the training mean, or always its median."""
    constants = {"mean": np.mean(training_counts), "median": np.median(training_counts)}
    return {
        name: {"constant": float(value), **counting_metrics(np.full(len(target), value), target)}
        for name, value in constants.items()
    }


def alignment(heatmap: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well each heatmap A lies on its target P.

    Cells with objects are those whose share of the objects is at least the average, 1 / cells.

    Args:
        heatmap, target: [B, 14, 14], each non-negative and summing to 1.

    Returns:
        [B] each: `kl`, KL(P || A) in nats, 0 is perfect; `mass_on_objects`, the part of A on cells with
        objects, 0..1; `pearson`, correlation over cells, -1..1, 0 for a constant map; `pointing`, 1 where
        the largest cell of A has objects (the pointing game of Zhang et al., ECCV 2016), else 0.
    """
    a, p = heatmap.flatten(1).float(), target.flatten(1).float()  # [B, 196]
    on_objects = p >= 1 / p.shape[1]
    centred_a, centred_p = (x - x.mean(dim=1, keepdim=True) for x in (a, p))
    scale = centred_a.norm(dim=1) * centred_p.norm(dim=1)
    return {
        "kl": kl_divergence(target, heatmap),
        "mass_on_objects": (a * on_objects).sum(dim=1),
        "pearson": torch.where(scale > 0, (centred_a * centred_p).sum(dim=1) / scale.clamp_min(1e-12), 0.0),
        "pointing": on_objects.gather(1, a.argmax(dim=1, keepdim=True))[:, 0].float(),
    }
