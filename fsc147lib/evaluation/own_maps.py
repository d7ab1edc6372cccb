"""How much a map changes when the digits are the model's own instead of the true ones.

Training and `evaluate` hold the map of the true answer against the target; a picture shows that of the model's own.
"""

import torch

from ..data import Sample, kl_divergence
from ..model import CountingModel, look, mean_map
from .metrics import alignment


def own_against_true(
    model: CountingModel, samples: list[Sample], layers: tuple[int, ...] | None = None, batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """Attention maps of the same images (with objects) under both answers; `layers` as in `look`.

    Returns:
        For all images, those answered exactly and those that are not (where there are any): `images`;
        `kl_between`, the mean KL(true answer's map || own answer's map) in nats; `alignment` of each with the
        target, as `kl_true`, `kl_own`, `mass_on_objects_true` and so on.
    """
    true, own = (mean_map(look(model, samples, layers, batch_size, answer)) for answer in ("true", "own"))
    target = torch.stack([torch.from_numpy(sample.target) for sample in samples])
    measured = {"kl_between": kl_divergence(true.maps, own.maps)}
    for seen in (true, own):
        measured |= {f"{key}_{seen.whose}": values for key, values in alignment(seen.maps, target).items()}
    exact = torch.tensor([said == wanted for said, wanted in zip(own.answers, true.answers, strict=True)])
    groups = {"all": torch.ones_like(exact), "exactly right": exact, "not right": ~exact}
    return {
        name: {"images": int(chosen.sum()), **{key: float(values[chosen].mean()) for key, values in measured.items()}}
        for name, chosen in groups.items()
        if chosen.any()
    }


def own_against_true_table(groups: dict[str, dict[str, float]]) -> str:
    """The groups of `own_against_true` side by side, as text."""
    lines = [f"{'':24}" + "".join(f"{group:>16}" for group in groups)]
    for name in next(iter(groups.values())):
        form = "16d" if name == "images" else "z16.3f"
        lines.append(f"{name:24}" + "".join(format(row[name], form) for row in groups.values()))
    return "\n".join(lines)
