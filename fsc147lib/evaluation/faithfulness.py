"""Whether a map is faithful: the model needs the cells that the map marks, and the map depends on the weights.

Deletion hides visual tokens in the map's order, insertion shows them (Petsiuk et al., "RISE", BMVC 2018).
Re-drawn weights must change a faithful map (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..data import Sample, kl_divergence, resample_map
from ..data.targets import centre_blob
from ..model import Batch, CountingModel, choose_compute, look, make_heatmap, mean_map, method_names
from ..model.looking import answered_batches
from ..model.occlusion import hidden_log_probabilities
from ..options import ConfigError
from ..readers import progress_bar
from .metrics import alignment, bootstrap_interval, correlation
from .tables import aligned

CHANCE = ("uniform", "centre", "another image's target")
"""Maps that do not depend on the picture."""

MEASURES = {
    "kl": "KL to target", "mass_on_objects": "on objects", "pointing": "pointing",
    "deletion": "deletion", "insertion": "insertion", "redrawn": "re-drawn",
}  # fmt: skip
"""Columns of `faithfulness_table`: key and heading."""


@dataclass
class Faithfulness:
    """Measures of a kind of map over N images; a measure that was not taken is empty or None."""

    alignment: dict[str, np.ndarray] = field(default_factory=dict)  # measure of `metrics.alignment` -> [N]
    curves: np.ndarray | None = None  # [N, 2, steps + 1], of `token_curves`
    better: dict[str, np.ndarray] = field(default_factory=dict)
    """"deletion", "insertion" -> [N] area in nats between the map's curve and the random order's; above 0 is good."""
    similarity: dict[str, np.ndarray] = field(default_factory=dict)
    """Part that was re-drawn last -> [N] rank correlation with the map of the unchanged model, -1..1."""

    def measures(self) -> dict[str, np.ndarray]:
        """All measures by name, [N] each; "redrawn" is the similarity once everything is re-drawn."""
        redrawn = {"redrawn": list(self.similarity.values())[-1]} if self.similarity else {}
        return {**self.alignment, **self.better, **redrawn}


def measure_maps(
    model: CountingModel,
    samples: list[Sample],
    methods: Sequence[str] | None = None,
    redrawn: Sequence[str] | None = None,
    steps: int = 8,
) -> dict[str, Faithfulness]:
    """Measure heatmap methods while the model gives its own answers; the results are the same on every call.

    Args:
        samples: two or more with objects; a ConfigError for fewer, or for an empty scene.
        methods: names of heatmap methods; None for all.
        redrawn: the methods whose `similarity` is measured, which needs a map of each re-drawn network; None for all.
        steps: number of equal steps in which all tokens of an image are hidden or shown.

    Returns:
        `Faithfulness` by name: of each method, of "target" (the target used as a map), of the maps in CHANCE
        (alignment alone), and of "random order" (curves alone, the mean of two random orders).
    """
    if len(samples) < 2 or not all(sample.count for sample in samples):
        raise ConfigError("maps are held against another image's target: give two samples or more, all with objects")
    compute, methods = choose_compute(), list(method_names() if methods is None else methods)
    redrawn = methods if redrawn is None else redrawn
    batches = [batch for batch, _ in answered_batches(model, samples, compute)]
    target = torch.from_numpy(np.stack([sample.target for sample in samples]))  # [N, 14, 14]
    chance = torch.full_like(target, 1 / target[0].numel()), centre_blob(target, 1 / 4), target.roll(1, dims=0)
    orders = torch.from_numpy(np.random.default_rng(0).random((2, *target.shape)))
    with compute.autocast():
        maps = {name: _maps(model.network, batches, name) for name in progress_bar(methods, desc="maps", leave=False)}
        maps |= {"target": target, **dict(zip(CHANCE, chance, strict=True))}
        found = {
            name: Faithfulness({key: values.numpy() for key, values in alignment(map_, target).items()})
            for name, map_ in maps.items()
        }
        random = np.mean([token_curves(model.network, batches, order, steps) for order in orders], axis=0)
        found["random order"] = Faithfulness(curves=random)
        for name in progress_bar([*methods, "target"], desc="curves", leave=False):
            found[name].curves = token_curves(model.network, batches, maps[name], steps)
            area = np.trapezoid(found[name].curves - random, dx=1 / steps)  # [N, 2]
            found[name].better = {"deletion": -area[:, 0], "insertion": area[:, 1]}
        for layer, network in redrawn_networks(model.network) if redrawn else ():
            for name in redrawn:
                found[name].similarity[layer] = rank_correlation(maps[name], _maps(network, batches, name))
    return found


def _maps(network, batches: list[Batch], method: str) -> torch.Tensor:
    return torch.cat([make_heatmap(network, method)(batch).float().cpu() for batch in batches])


def token_curves(network, batches: list[Batch], maps: torch.Tensor, steps: int) -> np.ndarray:
    """Log-probability of the answer's digits while an image's tokens are hidden in grey, and while they are shown.

    Tokens come in falling order of `maps` [N, 14, 14], resampled to the token grid; equal tokens in a random order
    that is the same on every call.

    Returns:
        [N, 2, steps + 1] in nats.  Row 0 (deletion) goes from the whole picture to a grey one, row 1 (insertion) back.
    """
    curves: list[torch.Tensor] = []
    rng, merge = np.random.default_rng(0), network.config.vision_config.spatial_merge_size
    insertion = [steps, *range(steps + 1, 2 * steps), 0]  # its ends are the pictures at the ends of deletion
    for batch in batches:
        hidden = []
        for map_, (rows, columns) in zip(maps[len(curves) :], batch["image_sizes"], strict=False):
            values = resample_map(map_.double().numpy(), (rows // merge, columns // merge)).round(9)
            rank = np.lexsort((rng.random(values.size), -values.ravel())).argsort()
            edges = np.linspace(0, values.size, steps + 1).round()[:, None]
            cells = np.concatenate([rank < edges, rank >= edges[1:-1]])  # [2 * steps, tokens]
            hidden.append(torch.from_numpy(cells.reshape(-1, *values.shape)))
        for score in hidden_log_probabilities(network, batch, hidden):  # [2 * steps]
            curves.append(score[[*range(steps + 1), *insertion]].view(2, -1).double().cpu())
    return torch.stack(curves).numpy()


def redrawn_networks(network) -> Iterator[tuple[str, torch.nn.Module]]:
    """A copy of the network after each step of re-drawing: language layers from last to first, then the vision encoder.

    To re-draw a tensor is to put its own values in a random order.

    Returns:
        Pairs of the part that was re-drawn last, and the copy, which each step changes further.
    """
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    layers = network.model.language_model.layers
    parts = {f"layer {i}": layers[i] for i in reversed(range(len(layers)))} | {"vision": network.model.visual}
    for name, part in parts.items():
        with torch.no_grad():
            for weight in part.parameters():
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
        yield name, network


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Spearman's rank correlation over the cells of each pair of maps [N, 14, 14]: [N], -1..1; 0 of a constant map."""
    from scipy.stats import rankdata  # takes half a second to import

    return correlation(*(torch.from_numpy(rankdata(maps.flatten(1), axis=1)) for maps in (first, second))).numpy()


def faithfulness_table(found: dict[str, Faithfulness]) -> str:
    """Results of `measure_maps` as text: a row for each map, mean ± half the width of the 95 % bootstrap interval.

    The column "re-drawn" is the similarity after all parts were re-drawn.
    """
    rows = [["", *MEASURES.values()]]
    for name, kind in found.items():
        values = kind.alignment | kind.better
        if kind.similarity:
            values["redrawn"] = list(kind.similarity.values())[-1]
        intervals = {key: bootstrap_interval(values[key]) for key in MEASURES if key in values}
        cells = {key: f"{mean:z.2f} ±{(high - low) / 2:.2f}" for key, (low, mean, high) in intervals.items()}
        if cells:
            rows.append([name, *(cells.get(key, "-") for key in MEASURES)])
    return aligned(rows)


def own_against_true(model: CountingModel, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Compare attention maps under the true answers, which training uses, with those under the model's own answers.

    The samples have objects.

    Returns:
        For the groups "all", "exactly right" and "not right", if not empty: `images`, their number; `kl_between`, mean
        KL(map of the true answer || map of the own answer) in nats; the mean of each measure of `alignment` for both
        maps, as `kl_true`, `kl_own`, `mass_on_objects_true`...
    """
    true, own = (mean_map(look(model, samples, answer=answer)) for answer in ("true", "own"))
    target = torch.stack([torch.from_numpy(sample.target) for sample in samples])
    measured = {"kl_between": kl_divergence(true.maps, own.maps)}
    for seen in (true, own):
        measured |= {f"{key}_{seen.whose}": values for key, values in alignment(seen.maps, target).items()}
    exact = torch.tensor([said == right for said, right in zip(own.answers, true.answers, strict=True)])
    groups = {"all": torch.ones_like(exact), "exactly right": exact, "not right": ~exact}
    return {
        name: {"images": int(chosen.sum()), **{key: float(values[chosen].mean()) for key, values in measured.items()}}
        for name, chosen in groups.items()
        if chosen.any()
    }


def own_against_true_table(groups: dict[str, dict[str, float]]) -> str:
    """The groups of `own_against_true` side by side, as text."""
    rows = [["", *groups]]
    for name in next(iter(groups.values())):
        rows.append([name, *(format(row[name], "d" if name == "images" else "z.3f") for row in groups.values())])
    return aligned(rows)
