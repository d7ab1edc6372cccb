"""Where the model looks: several methods, one signature, each a [B, 14, 14] heatmap that sums to 1.

`attention` is the probability mass that goes from the positions which predict the count's digits to the
visual tokens.  The gradient methods ask which visual tokens (or pixels) the log-probability of the digits
depends on.  All are moved to 14x14 by exact areas and renormalised, and all but `attention_x_gradient`
can keep their graph, so that a loss on them trains the network.

A new method is a function and a line in METHODS.

Left out: the losses, and how attention rows are caught (`forward.Probe`).
"""

from collections.abc import Callable
from typing import Literal

import torch
from tqdm import tqdm

from ..data.fsc147 import Sample
from ..options import ConfigError
from .collate import Batch, Collate, to_device
from .device import make_accelerator
from .forward import VISION, Probe, answer_logits, differentiable, encode_images, normalised_pixels
from .network import CountingModel

HEATMAP_EVERY = {"token_gradient": 32, "input_gradient": 64}
"""Default K of methods that cannot be paid on each step: spread over K steps they are within 6.5 % (notebook 02)."""

HEATMAP_IMAGES = {"token_gradient": 8, "input_gradient": 4}
"""How many images of a batch they look at by default; more would not fit beside a large batch."""

TrainableHeatmap = Literal["attention", "token_gradient", "input_gradient"]


class Heatmap:
    """A method with its choices; call it with a batch.

    Args:
        network: a Qwen3-VL with this library's attention (`load_model`).
        method: a name in METHODS.
        layers, heads: whose attention is averaged; None for `default_layers` and all heads.
        entering: of `token_gradient`: the layer whose incoming hidden states are looked at, from 0, the
            visual embeddings themselves, to the last.  The higher, the less of the network has to be
            differentiated twice.

    Raises:
        ConfigError: no such method, layer or head.
    """

    def __init__(self, network, method: str = "attention", layers=None, heads=None, entering: int = 0):
        depth = network.config.text_config.num_hidden_layers
        if method not in METHODS:
            raise ConfigError(f"heatmap is {method!r}, but must be one of {', '.join(METHODS)}")
        if not 0 <= entering < depth:
            raise ConfigError(f"heatmap_layer is {entering}, but this model has 0 to {depth - 1}")
        self.network, self.method, self.heads, self.entering = network, method, heads, entering
        self.layers = choose(network, layers, heads)

    def __call__(self, batch: Batch, keep_graph: bool = False) -> torch.Tensor:
        """One forward pass and its heatmap.

        Args:
            batch: from `Collate`, on the network's device.
            keep_graph: make the heatmap differentiable with respect to the network's weights.

        Returns:
            [B, 14, 14], non-negative, each summing to 1.
        """
        return self.with_logits(batch, keep_graph)[1]

    def with_logits(self, batch: Batch, keep_graph: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with the answer's logits [B, A, V] of that one pass, whose graph is kept where gradients are on."""
        logits, mass = METHODS[self.method](self, batch, keep_graph)
        if not keep_graph:
            mass = mass.detach()
        return logits, mass / mass.sum(dim=(1, 2), keepdim=True)


def choose(network, layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The layers to look at: those asked for, or `default_layers`.

    Raises:
        ConfigError: the language model has no such layer or head.
    """
    text = network.config.text_config
    for name, chosen, number in (
        ("attention_layers", layers, text.num_hidden_layers),
        ("attention_heads", heads, text.num_attention_heads),
    ):
        if chosen is not None and not (chosen and all(0 <= one < number for one in chosen)):
            raise ConfigError(f"{name} is {chosen}, but this model has 0 to {number - 1}: choose at least one of them")
    return layers or default_layers(text.num_hidden_layers)


def default_layers(depth: int) -> tuple[int, ...]:
    """About four layers, evenly over the second half of the language model, where answers are put together."""
    return tuple(range(depth // 2, depth, max(1, depth // 7)))


def visual_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention mass on the cells of the 14x14 grid, not renormalised.

    Args:
        rows: [B, ..., T] attention mass on every position of the sequence.
        batch: gives each visual token's place by `row_weights` and `column_weights`.

    Returns:
        [B, ..., 14, 14]; the sum is the mass on visual tokens, the rest went to text.
    """
    shape = (len(rows), *(1,) * (rows.ndim - 2))
    along_y, along_x = (batch[key].to(rows).unflatten(0, shape) for key in ("row_weights", "column_weights"))
    with torch.autocast(rows.device.type, enabled=False):  # in bf16 the product would lose mass
        return (along_y * rows.unsqueeze(-2)) @ along_x.transpose(-1, -2)


def _on_digits(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over the positions that predict a digit: [B, ..., A, T] -> [B, ..., T]."""
    weights = batch["digit_weights"].to(rows).unflatten(0, (len(rows), *(1,) * (rows.ndim - 3)))  # [B, ..., A]
    return (weights.unsqueeze(-1) * rows).sum(dim=-2)


def layer_head_maps(probe: Probe, batch: Batch) -> torch.Tensor:
    """What each layer and head looks at while it predicts the digits.

    Args:
        probe: after a forward pass that it asked for rows at `batch["answer_positions"]`.

    Returns:
        [B, L, H, 14, 14] attention mass, layers in the probe's order; sums are at most 1.
    """
    rows = torch.stack([probe.rows[layer] for layer in probe.layers], dim=1)  # [B, L, H, A, T]
    return visual_mass(_on_digits(rows, batch), batch)


# --- Methods: (heatmap, batch, keep_graph) -> logits [B, A, V], mass [B, 14, 14] before it is scaled to sum 1


def attention(heatmap: Heatmap, batch: Batch, keep_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass from the digits' positions, averaged over digits, layers and heads.

    Only the answer's query rows are computed a second time, so this costs next to nothing.
    """
    probe = Probe(batch["answer_positions"], heatmap.layers)
    logits = answer_logits(heatmap.network, batch, probe)
    return logits, visual_mass(_on_digits(_chosen_rows(probe.rows, heatmap).mean(dim=(0, 2)), batch), batch)


def token_gradient(heatmap: Heatmap, batch: Batch, keep_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """|g * e| of each visual token, summed over channels: its state e entering a layer, and the digits' gradient g.

    The gradient is that of their log-probability (gradient x input: Shrikumar et al., 2016).  Deepstack
    features that are added after that layer count as parts of e.  The product is taken channel by channel:
    layers read a state only after normalising it, so that g . e, the effect of scaling the whole state,
    vanishes towards the last layers.
    """
    first, probe = heatmap.entering, Probe(batch["answer_positions"], entering=heatmap.entering)
    with torch.enable_grad():
        images = encode_images(heatmap.network, batch)
        images.deepstack[first:] = [differentiable(features) for features in images.deepstack[first:]]  # [V, C] each
        logits = answer_logits(heatmap.network, batch, probe, first, keep_graph, images)
        inputs = [probe.state, *images.deepstack[first:]]
        gradients = _gradients(logits, batch, inputs, keep_graph)
        hidden, *deepstack = ((x * gradient).abs().sum(dim=-1) for x, gradient in zip(inputs, gradients, strict=True))
        tokens = hidden.flatten()[batch["visual_index"]] + sum(deepstack)  # [V]
    return logits, visual_mass(_on_sequence(tokens, batch), batch)


def input_gradient(heatmap: Heatmap, batch: Batch, keep_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """|gradient| of the digits' log-probability with respect to the pixels, summed over each visual token's pixels.

    The first script's heatmap.  To train it the whole network is differentiated twice, frozen or not.
    """
    pixels = normalised_pixels(batch).detach().requires_grad_()  # [P, 3 * 2 * 16 * 16]
    with torch.enable_grad():
        logits = answer_logits(heatmap.network, {**batch, "pixel_values": pixels}, None, VISION, keep_graph)
        (gradient,) = _gradients(logits, batch, [pixels], keep_graph)
        merged = heatmap.network.config.vision_config.spatial_merge_size**2
        tokens = gradient.abs().sum(dim=-1).unflatten(0, (-1, merged)).sum(dim=-1)  # [V]: patches come token by token
    return logits, visual_mass(_on_sequence(tokens, batch), batch)


def attention_x_gradient(heatmap: Heatmap, batch: Batch, keep_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that helps: each probability times its gradient where that is positive, averaged over heads.

    After Chefer et al., "Generic Attention-model Explainability" (ICCV 2021), without their roll-out.
    """
    if keep_graph:
        raise ConfigError(
            "attention_x_gradient is for looking: its sign change has no useful gradient; "
            "train with attention, token_gradient or input_gradient"
        )
    probe = Probe(batch["answer_positions"], heatmap.layers, in_path=True)
    with torch.enable_grad():
        logits = answer_logits(heatmap.network, batch, probe, min(heatmap.layers))
        rows = [probe.rows[layer] for layer in heatmap.layers]
        helpful = [(row * g).relu() for row, g in zip(rows, _gradients(logits, batch, rows, False), strict=True)]
    mean = _chosen_rows(dict(zip(heatmap.layers, helpful, strict=True)), heatmap).mean(dim=(0, 2))
    return logits, visual_mass(_on_digits(mean, batch), batch)


METHODS: dict[str, Callable] = {
    "attention": attention,
    "token_gradient": token_gradient,
    "input_gradient": input_gradient,
    "attention_x_gradient": attention_x_gradient,
}


def _chosen_rows(rows: dict[int, torch.Tensor], heatmap: Heatmap) -> torch.Tensor:
    """[L, B, H, A, T] of the chosen layers and heads."""
    stacked = torch.stack([rows[layer] for layer in heatmap.layers])
    return stacked if heatmap.heads is None else stacked[:, :, list(heatmap.heads)]


def _gradients(logits: torch.Tensor, batch: Batch, inputs: list[torch.Tensor], keep_graph: bool) -> list[torch.Tensor]:
    """Gradients of the digits' log-probability; samples do not meet, so the sum over the batch serves them all."""
    log_probability = logits.float().log_softmax(dim=-1)
    labels = batch["answer_labels"].clamp_min(0).unsqueeze(-1)
    digits = batch["digit_weights"] > 0  # [B, A]
    score = (log_probability.gather(-1, labels)[..., 0] * digits).sum()
    return list(torch.autograd.grad(score, inputs, create_graph=keep_graph, retain_graph=True))


def _on_sequence(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values of the visual tokens [V] put in their places [B, T], 0 elsewhere."""
    empty = tokens.new_zeros(batch["input_ids"].numel())
    return empty.index_copy(0, batch["visual_index"], tokens).view(batch["input_ids"].shape)


@torch.no_grad()
def look(
    model: CountingModel, samples: list[Sample], layers: tuple[int, ...] | None = None, batch_size: int = 16
) -> torch.Tensor:
    """Where a model's attention goes on some samples while it is told the right answer.

    Args:
        model: is moved to this machine's accelerator, if it has one, and put in eval mode.
        samples: with images.
        layers: None for `default_layers`.

    Returns:
        [N, L, H, 14, 14] float32 on the CPU: the attention mass of every layer and head.
    """
    accelerator = make_accelerator("auto")
    network = model.network.to(accelerator.device).eval()
    layers = choose(network, layers)
    collate = Collate(model.tokenizer, model.image_processor)
    maps = []
    for start in tqdm(range(0, len(samples), batch_size), desc="look", leave=False):
        batch = to_device(collate(samples[start : start + batch_size]), accelerator.device)
        probe = Probe(batch["answer_positions"], layers)
        with accelerator.autocast():
            answer_logits(network, batch, probe)
        maps.append(layer_head_maps(probe, batch).float().cpu())
    return torch.cat(maps)


def mean_map(maps: torch.Tensor) -> torch.Tensor:
    """The `attention` heatmaps [N, 14, 14], each summing to 1, of the layers and heads in maps [N, L, H, 14, 14]."""
    mean = maps.mean(dim=(1, 2))
    return mean / mean.sum(dim=(1, 2), keepdim=True)


def corner_share(maps: torch.Tensor) -> torch.Tensor:
    """How much of each head's attention to the image lies in the top-left cell: [N, L, H, 14, 14] -> mean [L, H].

    Even attention would give 1/196.  Qwen-VL is known to let attention sink there.
    """
    return (maps[..., 0, 0] / maps.sum(dim=(-1, -2)).clamp_min(1e-9)).mean(dim=0)
