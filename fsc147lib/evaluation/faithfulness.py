"""Is a map true?  Whether the model needs what a map marks, and whether the map needs the model.

Hiding visual tokens in a map's order must hurt the answer sooner than in a random order (deletion), and showing
them in that order must restore it sooner (insertion; Petsiuk et al., "RISE", BMVC 2018).  When the weights are
re-drawn layer by layer, the map must fall apart (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018).
And a map that lies on the objects must do so better than maps that know nothing of the picture.

Left out: the maps (`model.heatmaps`), and drawing (`report.faithful`).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..data import Sample, kl_divergence, resample_map
from ..data.targets import centre_blob
from ..model import Batch, CountingModel, choose_compute, look, make_heatmap, mean_map, method_names
from ..model.looking import Whose, answered_batches
from ..model.occlusion import hidden_log_probabilities
from ..options import ConfigError
from ..readers import progress_bar
from .metrics import alignment, bootstrap_interval, correlation
from .tables import aligned

CHANCE = ("uniform", "centre", "another image's target")
"""Maps that know nothing of their picture."""

RANDOM_ORDERS = 2  # whose curves are averaged


@dataclass
class Faithfulness:
    """What is known of one kind of map over N images; a measure that does not apply is left out.

    Attributes:
        alignment: measure -> [N], of `metrics.alignment`.
        curves: [N, 2, steps + 1] log-probability of the answer, in nats: first when ever more tokens are hidden,
            then when ever more are shown, each in the map's order.
        better: "deletion", "insertion" -> [N] area between that curve and the one in random order, in nats;
            above 0 the map's order is better.
        similarity: after so many layers are re-drawn -> [N] rank correlation with the map before, -1..1.
    """

    alignment: dict[str, np.ndarray] = field(default_factory=dict)
    curves: np.ndarray | None = None
    better: dict[str, np.ndarray] = field(default_factory=dict)
    similarity: dict[str, np.ndarray] = field(default_factory=dict)

    def measures(self) -> dict[str, np.ndarray]:
        """Each measure's values [N]; "redrawn" is the similarity once all layers are."""
        redrawn = {"redrawn": list(self.similarity.values())[-1]} if self.similarity else {}
        return {**self.alignment, **self.better, **redrawn}


def measure_maps(
    model: CountingModel,
    samples: list[Sample],
    methods: Sequence[str] | None = None,
    redrawn: Sequence[str] | None = None,
    steps: int = 8,
    answer: Whose = "own",
) -> dict[str, Faithfulness]:
    """Measure methods on two or more samples with objects; the same on every call.

    Args:
        model: as in `look`.
        methods: names in METHODS; None for all.
        redrawn: those of them that are repeated with re-drawn weights, layer by layer; None for all.
        steps: in how many equal steps the tokens of an image are hidden, in grey.
        answer: whose map, and whose log-probability.

    Returns:
        Of each method; of the target itself, held against the model; of a random order, and of CHANCE.

    Raises:
        ConfigError: fewer than two samples, or one without objects.
    """
    if len(samples) < 2 or not all(sample.count for sample in samples):
        raise ConfigError("maps are held against another image's target: give two samples or more, all with objects")
    compute = choose_compute()
    methods, rng = list(method_names() if methods is None else methods), np.random.default_rng(0)
    batches = [batch for batch, _ in answered_batches(model, samples, compute, answer=answer)]
    target = torch.stack([torch.from_numpy(sample.target) for sample in samples])
    with compute.autocast():
        maps = {name: _maps(model.network, batches, name) for name in progress_bar(methods, desc="maps", leave=False)}
        uniform = torch.full_like(target, 1 / target[0].numel())
        chance = (uniform, centre_blob(target, 1 / 4), target.roll(1, dims=0))
        maps |= {"target": target, **dict(zip(CHANCE, chance, strict=True))}
        found = {}
        for name, map_ in maps.items():
            found[name] = Faithfulness({key: values.numpy() for key, values in alignment(map_, target).items()})
        shuffled = [torch.from_numpy(rng.random(target.shape)) for _ in range(RANDOM_ORDERS)]
        random = np.mean([token_curves(model.network, batches, order, steps) for order in shuffled], axis=0)
        found["random order"] = Faithfulness(curves=random)
        for name in progress_bar([*methods, "target"], desc="curves", leave=False):
            found[name].curves = token_curves(model.network, batches, maps[name], steps)
            area = np.trapezoid(found[name].curves - random, dx=1 / steps)  # [N, 2]
            found[name].better = {"deletion": -area[:, 0], "insertion": area[:, 1]}
        redrawn = methods if redrawn is None else redrawn
        for layer, network in redrawn_networks(model.network) if redrawn else ():
            for name in redrawn:
                found[name].similarity[layer] = rank_correlation(maps[name], _maps(network, batches, name))
    return found


def _maps(network, batches: list[Batch], method: str) -> torch.Tensor:
    return torch.cat([make_heatmap(network, method)(batch).float().cpu() for batch in batches])


def token_curves(network, batches: list[Batch], maps: torch.Tensor, steps: int) -> np.ndarray:
    """Deletion and insertion, see `Faithfulness.curves`.

    Args:
        maps: [N, 14, 14], moved to each image's tokens; equal tokens come in random order, the same on every call.

    Returns:
        [N, 2, steps + 1]; the first point of deletion is the whole picture, that of insertion none of it.
    """
    curves, start, rng = [], 0, np.random.default_rng(0)
    merge = network.config.vision_config.spatial_merge_size
    for batch in batches:
        hidden = []
        for map_, (rows, columns) in zip(maps[start:], batch["image_sizes"], strict=False):
            values = resample_map(map_.double().numpy(), (rows // merge, columns // merge)).round(9)
            rank = np.empty(values.size, dtype=int)
            rank[np.lexsort((rng.random(values.size), -values.ravel()))] = np.arange(values.size)
            edges = np.linspace(0, values.size, steps + 1).round()[:, None]
            cells = np.concatenate([rank < edges, rank >= edges[1:-1]])  # the ends of both are the same pictures
            hidden.append(torch.from_numpy(cells.reshape(-1, *values.shape)))
        start += len(hidden)
        for score in hidden_log_probabilities(network, batch, hidden):
            deletion, insertion = score.float().cpu().split([steps + 1, steps - 1])
            curves.append(torch.stack([deletion, torch.cat([deletion[-1:], insertion, deletion[:1]])]))
    return torch.stack(curves).double().numpy()


def redrawn_networks(network) -> Iterator[tuple[str, torch.nn.Module]]:
    """The network with one layer more re-drawn each time: the language model's from the last to the first, then vision.

    A weight is drawn from the values of its own tensor, which are put in a random order: so all sizes stay, and
    only what was learned goes.

    Returns:
        Pairs of the layer that was just re-drawn, and the network (always the same one).
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
    """Spearman's, over the cells of each pair of maps [N, 14, 14]: [N], -1..1; 0 for a constant map."""
    from scipy.stats import rankdata  # half a second, which every start would wait for

    return correlation(*(torch.from_numpy(rankdata(maps.flatten(1), axis=1)) for maps in (first, second))).numpy()


MEASURES = {  # of `Faithfulness.measures`: heading
    "kl": "KL to target", "mass_on_objects": "on objects", "pointing": "pointing",
    "deletion": "deletion", "insertion": "insertion", "redrawn": "re-drawn",
}  # fmt: skip


def faithfulness_table(found: dict[str, Faithfulness]) -> str:
    """Kinds of maps x measures, each a mean and half the width of its 95 % bootstrap interval over images."""
    rows = [["", *MEASURES.values()]]
    for name, one in found.items():
        cells = {}
        for key, values in one.measures().items():
            low, mean, high = bootstrap_interval(values)
            cells[key] = f"{mean:z.2f} ±{(high - low) / 2:.2f}"
        if cells:
            rows.append([name, *(cells.get(key, "-") for key in MEASURES)])
    return aligned(rows)


# --- The map of the true answer beside that of the model's own


def own_against_true(model: CountingModel, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """How much attention maps of images with objects change where the digits are the model's own, not the true ones.

    Training and `evaluate` hold the map of the true answer against the target; a picture shows that of the own one.

    Returns:
        For all images, those answered exactly and those that are not (where there are any): `images`;
        `kl_between`, the mean KL(true answer's map || own answer's map) in nats; `alignment` of each with the
        target, as `kl_true`, `kl_own`, `mass_on_objects_true` and so on.
    """
    true, own = (mean_map(look(model, samples, answer=answer)) for answer in ("true", "own"))
    target = torch.stack([torch.from_numpy(sample.target) for sample in samples])
    measured = {"kl_between": kl_divergence(true.maps, own.maps)}
    for seen in (true, own):
        measured |= {f"{key}_{seen.whose}": values for key, values in alignment(seen.maps, target).items()}
    exact = torch.tensor([one == other for one, other in zip(own.answers, true.answers, strict=True)])
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
