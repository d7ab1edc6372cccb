"""What one model says of samples and where it looks, each computed when it is first asked for, and kept.

Left out: how any of it is computed (`model`, `evaluation`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..data import GRID, Sample
from ..evaluation import alignment
from ..model import CountingModel, Prediction, count_without, default_layers, look, predict_samples
from ..model.prompt import parse_count


class Kept:
    """A model's answers, maps and predictions; a second question costs nothing.

    Attributes:
        layers, heads: all numbers of this model's.
        default_layers: those whose attention is averaged unless others are chosen.
    """

    def __init__(self, model: CountingModel):
        self.model, self._found = model, {}
        text = model.network.config.text_config
        self.layers, self.heads = tuple(range(text.num_hidden_layers)), tuple(range(text.num_attention_heads))
        self.default_layers = default_layers(len(self.layers))

    def _once(self, key: tuple, compute: Callable):
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def attention(self, sample: Sample, answer: str = "own", word: str = "all") -> tuple[np.ndarray, str]:
        """Attention mass [L, H, 14, 14] of all layers and heads, and the answer."""

        def compute():
            seen = look(self.model, [sample], self.layers, answer=answer, word=word)
            return seen.maps[0].numpy(), seen.answers[0]

        return self._once(("attention", sample, answer, word), compute)

    def map(
        self, sample: Sample, method: str, layers: tuple, heads: tuple | None, answer: str, word: str
    ) -> tuple[np.ndarray, str]:
        """A heatmap [14, 14] that sums to 1, and the answer during which it was seen; choices as of `look`."""
        if method == "attention":
            maps, text = self.attention(sample, answer, word)
            mean = maps[list(layers)][:, list(heads or self.heads)].mean(axis=(0, 1))
            return mean / mean.sum(), text
        if not has_heads(method):
            layers, heads = self.default_layers, None

        def compute():
            seen = look(self.model, [sample], layers, 16, answer, method, heads, word)
            return seen.maps[0].numpy(), seen.answers[0]

        return self._once((method, sample, layers, heads, answer, word), compute)

    def rows(self, samples: Sequence[Sample]) -> list[dict]:
        """Of each sample "count", "predicted" (None: no number), and "kl" of its attention (NaN: nothing to count)."""
        new = [sample for sample in samples if ("attention", sample, "own", "all") not in self._found]
        if new:
            seen = look(self.model, new, self.layers)
            for sample, maps, text in zip(new, seen.maps.numpy(), seen.answers, strict=True):
                self._found["attention", sample, "own", "all"] = maps, text

        def compute():
            found = [self.map(s, "attention", self.default_layers, None, "own", "all") for s in samples]
            kl = measures(np.stack([heatmap for heatmap, _ in found]), np.stack([s.target for s in samples]))["kl"]
            return [
                {"count": sample.count, "predicted": parse_count(text), "kl": float(one)}
                for sample, (_, text), one in zip(samples, found, kl, strict=True)
            ]

        return self._once(("rows", *samples), compute)

    def prediction(self, sample: Sample, cells: tuple[int, ...] = ()) -> Prediction:
        """What the model says of a sample, with some of the 196 cells hidden."""

        def compute():
            if not cells:
                return predict_samples(self.model, [sample])[0]
            hidden = np.zeros(GRID * GRID, bool)
            hidden[list(cells)] = True
            return count_without(self.model, sample, hidden.reshape(GRID, GRID))

        return self._once(("prediction", sample, cells), compute)

    def has_prediction(self, sample: Sample) -> bool:
        """Whether `prediction` costs nothing."""
        return ("prediction", sample, ()) in self._found


def has_heads(method: str) -> bool:
    """Whether layers and heads can be chosen: the gradient methods and occlusion have none."""
    return "attention" in method


def measures(maps: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """`alignment` of [N, 14, 14] maps with their targets, [N] each."""
    found = alignment(torch.from_numpy(np.ascontiguousarray(maps)), torch.from_numpy(targets))
    return {name: values.numpy() for name, values in found.items()}
