"""Where the model looks: several methods, one signature, each a [B, 14, 14] heatmap that sums to 1.

All are moved to 14x14 by exact areas and renormalised, and those that are `trainable` can keep their graph, so that a
loss on them trains the network.  A new method is a function given to `register`, from any file.

Left out: the losses, how attention rows are computed (`layers`), and looking at samples (`looking`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..options import ConfigError
from .answers import digits_score
from .collate import Batch
from .forward import VISION, Trace, answer_logits, continue_pass, normalised_pixels
from .gradient_difference import gradients_by_difference


class Method(NamedTuple):
    """The arguments of `register`."""

    function: Callable
    trainable: bool
    every: int
    images: int | None


METHODS: dict[str, Method] = {}


def register(name: str, function: Callable, trainable: bool = True, every: int = 1, images: int | None = None) -> None:
    """Make a heatmap method known under a name, to `Heatmap`, `TrainConfig(heatmap=name)` and `evaluate --heatmap`.

    Args:
        name: a known one is replaced.
        function: `(heatmap, batch, create_graph, **kwargs) -> logits [B, A, V], mass [B, 14, 14], trace`, logits
            and trace from one `answer_logits(heatmap.network, batch, ..., **kwargs)`.  The mass is non-negative,
            and is scaled to sum 1 afterwards; with `create_graph` it has a gradient with respect to the weights.
        trainable: whether it has.
        every, images: of `TrainConfig`, by default: look on each K-th step, at so many images of a batch (None: all).
    """
    METHODS[name] = Method(function, trainable, every, images)


def method_names(trainable: bool = False) -> tuple[str, ...]:
    """All methods, or those that can be trained."""
    return tuple(name for name, method in METHODS.items() if method.trainable or not trainable)


class Heatmap:
    """A method with its choices; call it with a batch.

    Args:
        network: a Qwen3-VL (`load_model`).
        method: a name in METHODS.
        layers, heads: whose attention is averaged; None for `default_layers` and all heads.
        state_layer: of `token_gradient`: the layer whose incoming hidden states are looked at, from 0, the visual
            embeddings themselves.  The higher, the less of the network has to be differentiated twice.
        compiled: compile the layers in passes through the network.
        gradient_method: of `token_gradient`, how it is trained: "exact", or by "difference" (`gradient_difference`),
            whose logits have no gradient of their own.

    Raises:
        ConfigError: no such method, layer or head.
    """

    def __init__(
        self,
        network,
        method: str = "attention",
        layers: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
        state_layer: int = 0,
        compiled: bool = False,
        gradient_method: str = "exact",
    ):
        text = network.config.text_config
        depth, width = text.num_hidden_layers, text.num_attention_heads
        if method not in METHODS:
            raise ConfigError(f"heatmap is {method!r}, but must be one of {', '.join(METHODS)}")
        if not 0 <= state_layer < depth:
            raise ConfigError(f"heatmap_layer is {state_layer}, but this model has 0 to {depth - 1}")
        for name, chosen, number in (("attention_layers", layers, depth), ("attention_heads", heads, width)):
            if chosen is not None and not (chosen and all(0 <= one < number for one in chosen)):
                has = f"this model has 0 to {number - 1}: choose at least one of them"
                raise ConfigError(f"{name} is {chosen}, but {has}")
        self.network, self.method, self.heads, self.state_layer = network, method, heads, state_layer
        self.layers, self.compiled = layers or default_layers(depth), compiled
        self.by_difference = method == "token_gradient" and gradient_method == "difference"

    def __call__(self, batch: Batch, create_graph: bool = False) -> torch.Tensor:
        """One forward pass and its heatmap [B, 14, 14], non-negative, each summing to 1; see `with_logits`."""
        return self.with_logits(batch, create_graph)[1]

    def with_logits(
        self, batch: Batch, create_graph: bool = False, keep_keys: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, Trace]:
        """One forward pass: the answer's logits [B, A, V], the heatmap [B, 14, 14], and the trace.

        With `create_graph` the heatmap is differentiable with respect to the network's weights, or a ConfigError says
        that the method cannot be trained; the logits' graph is kept wherever gradients are on.
        """
        method = METHODS[self.method]
        if create_graph and not method.trainable:
            choices = ", ".join(method_names(trainable=True))
            raise ConfigError(f"{self.method} is for looking, it has no useful gradient; train with one of {choices}")
        logits, mass, trace = method.function(self, batch, create_graph, compiled=self.compiled, keep_keys=keep_keys)
        if not create_graph:
            mass = mass.detach()
        return logits, mass / mass.sum(dim=(1, 2), keepdim=True), trace

    def mean_rows(self, rows: dict[int, torch.Tensor]) -> torch.Tensor:
        """[B, A, T], the mean of the chosen layers' and heads' rows [B, H, A, T]."""
        stacked = torch.stack([rows[layer] for layer in self.layers])  # [L, B, H, A, T]
        return (stacked if self.heads is None else stacked[:, :, list(self.heads)]).mean(dim=(0, 2))


def default_layers(depth: int) -> tuple[int, ...]:
    """About four layers, evenly over the second half of the language model, where answers are put together."""
    return tuple(range(depth // 2, depth, max(1, depth // 7)))


def visual_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention mass on all positions [B, ..., T] moved to the cells of the 14x14 grid: [B, ..., 14, 14].

    The sum is the mass on visual tokens, the rest went to text; it is not renormalised.
    """
    shape = (len(rows), *(1,) * (rows.ndim - 2))
    along_y, along_x = (batch[key].to(rows).unflatten(0, shape) for key in ("row_weights", "column_weights"))
    with torch.autocast(rows.device.type, enabled=False):  # in bf16 the product would lose mass
        return (along_y * rows.unsqueeze(-2)) @ along_x.transpose(-1, -2)


def digits_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of the mean over the positions that predict a digit: [B, ..., A, T] -> [B, ..., 14, 14]."""
    weights = batch["digit_weights"].to(rows).unflatten(0, (len(rows), *(1,) * (rows.ndim - 3)))  # [B, ..., A]
    return visual_mass((weights.unsqueeze(-1) * rows).sum(dim=-2), batch)


def layer_head_maps(trace: Trace, batch: Batch, layers: tuple[int, ...]) -> torch.Tensor:
    """Attention mass on the image of each traced layer and head while the digits are predicted: [B, L, H, 14, 14]."""
    return digits_mass(torch.stack([trace.rows[layer] for layer in layers], dim=1), batch)


# --- Methods, see `register`


def attention_mass(heatmap: Heatmap, batch: Batch, create_graph: bool, **kwargs):
    """Attention mass from the digits' positions, averaged over digits, layers and heads.

    Only the answer's query rows are computed a second time, so this costs next to nothing.
    """
    logits, trace = answer_logits(heatmap.network, batch, rows_of=heatmap.layers, **kwargs)
    return logits, digits_mass(heatmap.mean_rows(trace.rows), batch), trace


def relative_attention(heatmap: Heatmap, batch: Batch, create_graph: bool, **kwargs):
    """`attention` over that for a neutral question (`prompt.NEUTRAL`), cell by cell: what is there anyhow cancels.

    After Zhang et al., "MLLMs Know Where to Look" (ICLR 2025).  The neutral attention is that of the position where
    an answer would begin.  The image comes before the question, so its keys are the same, and only the
    question is computed anew.
    """
    logits, mass, trace = attention_mass(heatmap, batch, create_graph, **{**kwargs, "keep_keys": True})
    length = batch["input_ids"].shape[1]
    places = torch.arange(length, device=mass.device)
    end = (places * batch["mm_token_type_ids"]).amax(dim=1, keepdim=True) + 1  # [B, 1] the first place after the image
    tail = batch["neutral_tail"].expand(len(end), -1)  # [B, S]
    steps = torch.arange(tail.shape[1], device=mass.device)
    position_ids = batch["position_ids"].gather(2, end.expand(3, -1, -1)) + steps  # [3, B, S]
    image = (places < end)[:, None].expand(-1, len(steps), -1)  # [B, S, T]
    seen = torch.cat([image, (steps <= steps[:, None]).expand(len(end), -1, -1)], dim=2)[:, None]
    with torch.no_grad():
        _, rows = continue_pass(
            heatmap.network, tail, position_ids, seen, list(trace.keys_values), rows_of=heatmap.layers,
            compiled=heatmap.compiled,
        )  # fmt: skip
    neutral = visual_mass(heatmap.mean_rows(rows)[:, -1, :length], batch)
    return logits, mass / neutral.clamp_min(torch.finfo(neutral.dtype).tiny), trace


def token_gradient(heatmap: Heatmap, batch: Batch, create_graph: bool, **kwargs):
    """|g * e| of each visual token, summed over channels: its state e entering a layer, and the digits' gradient g.

    The gradient is that of their log-probability (gradient x input: Shrikumar et al., 2016).  Deepstack
    features that are added after that layer count as parts of e.  The product is taken channel by channel:
    layers read a state only after normalising it, so that g . e, the effect of scaling the whole state,
    vanishes towards the last layers.
    """
    with torch.enable_grad():
        if create_graph and heatmap.by_difference:
            logits, trace, inputs, gradients = gradients_by_difference(heatmap, batch, **kwargs)
        else:
            kwargs |= {"gradient_from": heatmap.state_layer, "create_graph": create_graph}
            logits, trace = answer_logits(heatmap.network, batch, **kwargs)
            inputs, gradients = trace.inputs, _gradients(logits, batch, trace.inputs, create_graph)
        products = ((x * gradient).abs().sum(dim=-1) for x, gradient in zip(inputs, gradients, strict=True))
        hidden, *deepstack = products  # [B, T], [V] each
        tokens = hidden.flatten()[batch["visual_index"]] + sum(deepstack)  # [V]
    return logits, _tokens_mass(tokens, batch), trace


def input_gradient(heatmap: Heatmap, batch: Batch, create_graph: bool, **kwargs):
    """|gradient| of the digits' log-probability with respect to the pixels, summed over each visual token's pixels.

    The first script's heatmap.  To train it the whole network is differentiated twice, frozen or not.
    """
    pixels = normalised_pixels(batch).detach().requires_grad_()  # [P, 3 * 2 * 16 * 16]
    batch = {**batch, "pixel_values": pixels}
    with torch.enable_grad():
        logits, trace = answer_logits(heatmap.network, batch, gradient_from=VISION, create_graph=create_graph, **kwargs)
        (gradient,) = _gradients(logits, batch, [pixels], create_graph)
        merged = heatmap.network.config.vision_config.spatial_merge_size**2
        tokens = gradient.abs().sum(dim=-1).unflatten(0, (-1, merged)).sum(dim=-1)  # [V]: patches come token by token
    return logits, _tokens_mass(tokens, batch), trace


def attention_x_gradient(heatmap: Heatmap, batch: Batch, create_graph: bool, **kwargs):
    """Attention that helps: each probability times its gradient where that is positive, averaged over heads.

    After Chefer et al., "Generic Attention-model Explainability" (ICCV 2021), without their roll-out.  Its sign
    changes leave no useful gradient to train with.
    """
    kwargs |= {"rows_of": heatmap.layers, "rows_in_output": True, "gradient_from": min(heatmap.layers)}
    with torch.enable_grad():
        logits, trace = answer_logits(heatmap.network, batch, **kwargs)
        gradients = _gradients(logits, batch, list(trace.rows.values()), False)
    both = zip(trace.rows.items(), gradients, strict=True)
    helpful = {layer: (row * gradient).relu() for (layer, row), gradient in both}
    return logits, digits_mass(heatmap.mean_rows(helpful), batch), trace


# Spread over K steps the gradient methods cost at most 6.5 % (notebook 02); more images would not fit beside a batch.
register("attention", attention_mass)
register("relative_attention", relative_attention, trainable=False)
register("token_gradient", token_gradient, every=32, images=8)
register("input_gradient", input_gradient, every=64, images=4)
register("attention_x_gradient", attention_x_gradient, trainable=False)


def _gradients(logits, batch: Batch, inputs: list[torch.Tensor], create_graph: bool) -> list[torch.Tensor]:
    """Gradients of the digits' log-probability; samples do not meet, so the sum over the batch serves them all."""
    score = digits_score(logits, batch).sum()
    return list(torch.autograd.grad(score, inputs, create_graph=create_graph, retain_graph=True))


def _tokens_mass(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of values of the visual tokens [V]: [B, 14, 14]."""
    empty = tokens.new_zeros(batch["input_ids"].numel())
    rows = empty.index_copy(0, batch["visual_index"], tokens).view(batch["input_ids"].shape)
    return visual_mass(rows, batch)
