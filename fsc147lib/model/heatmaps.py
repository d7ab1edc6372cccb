"""Where the model looks: several methods, one class each, each a [B, 14, 14] heatmap that sums to 1.

Maps on the token grid are moved to 14x14 by exact areas and scaled to sum 1.  Those of a `trainable` method can keep
their graph, so that a loss on them trains the network.  A method of one's own is a subclass given to `register`.
"""

from typing import cast

import torch
import torch.nn.functional as F

from ..options import ConfigError
from .answers import digits_score
from .collate import Batch
from .forward import Prompts, Rows, answer_logits, encode_images, normalised_pixels


class Heatmap:
    """One way to look; a subclass has a `name` and computes `mass`.

    Args:
        network: a Qwen3-VL (`load_model`).

    Attributes:
        trainable: whether the mass has a useful gradient with respect to the weights.
        every, images: of `TrainConfig`, by default: look on each K-th step, at so many images of a batch (None: all).
    """

    name: str
    trainable = True
    every = 1
    images: int | None = None

    def __init__(self, network):
        self.network = network

    def mass(
        self, batch: Batch, create_graph: bool = False, prompts: Prompts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer's logits [B, A, V] and a non-negative mass [B, 14, 14] of any sum above 0.

        With `create_graph` the mass has a gradient with respect to the weights.  `prompts`, where given, has read
        the batch's questions, images and all.
        """
        raise TypeError(f"{type(self).__name__} does not say how its mass is computed")

    def with_logits(
        self, batch: Batch, create_graph: bool = False, prompts: Prompts | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer's logits [B, A, V] and the heatmap [B, 14, 14], non-negative, each summing to 1.

        With `create_graph` the heatmap has a graph, or a ConfigError says that the method cannot be trained; the
        logits have theirs wherever gradients are on.
        """
        if create_graph and not self.trainable:
            choices = ", ".join(method_names(trainable=True))
            raise ConfigError(f"{self.name} is for looking, it has no useful gradient; train with one of {choices}")
        logits, mass = self.mass(batch, create_graph, prompts)
        if not create_graph:
            mass = mass.detach()
        return logits, mass / mass.sum(dim=(1, 2), keepdim=True)

    def __call__(self, batch: Batch, create_graph: bool = False) -> torch.Tensor:
        """The heatmap alone."""
        return self.with_logits(batch, create_graph)[1]


METHODS: dict[str, type[Heatmap]] = {}


def register(method: type[Heatmap]) -> type[Heatmap]:
    """Make a method known under its name to `train`, `evaluate`, `look` and the notebooks; a known one is replaced."""
    METHODS[method.name] = method
    return method


def method_names(trainable: bool = False) -> tuple[str, ...]:
    """All methods, or those that can be trained."""
    return tuple(name for name, method in METHODS.items() if method.trainable or not trainable)


def make_heatmap(
    network, name: str = "attention", layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None
) -> Heatmap:
    """A method by its name; `layers` and `heads` are for methods that read attention.

    A ConfigError where there is no such method, layer or head.
    """
    if name not in METHODS:
        raise ConfigError(f"heatmap is {name!r}, but must be one of {', '.join(METHODS)}")
    method = METHODS[name]
    if issubclass(method, Attention):
        return method(network, layers, heads)
    if layers is not None or heads is not None:
        raise ConfigError(f"{name} has no layers and heads to choose: leave attention_layers and attention_heads out")
    return method(network)


# --- From the token grid to 14x14


def visual_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mass on all positions [B, ..., T] moved to the cells of the 14x14 grid: [B, ..., 14, 14].

    The sum is the mass on visual tokens; the rest went to text.  Rows may end before T, behind the image.
    """
    shape, length = (len(rows), *(1,) * (rows.ndim - 2)), rows.shape[-1]
    along_y, along_x = (
        batch[key][..., :length].to(rows).unflatten(0, shape) for key in ("row_weights", "column_weights")
    )
    with torch.autocast(rows.device.type, enabled=False):  # in bf16 the product would lose mass
        return (along_y * rows[..., : along_y.shape[-1]].unsqueeze(-2)) @ along_x.transpose(-1, -2)


def digits_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of the mean over the positions that predict a digit: [B, ..., A, T] -> [B, ..., 14, 14]."""
    weights = batch["digit_weights"].to(rows).unflatten(0, (len(rows), *(1,) * (rows.ndim - 3)))  # [B, ..., A]
    return visual_mass((weights.unsqueeze(-1) * rows).sum(dim=-2), batch)


def layer_head_maps(rows: Rows, batch: Batch, layers: tuple[int, ...]) -> torch.Tensor:
    """Attention mass on the image of each layer and head while the digits are predicted: [B, L, H, 14, 14]."""
    return digits_mass(torch.stack([rows[layer] for layer in layers], dim=1), batch)


def tokens_mass(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of values of the V visual tokens: [V] -> [B, 14, 14]."""
    empty = tokens.new_zeros(batch["input_ids"].numel())
    return visual_mass(empty.index_copy(0, batch["visual_index"], tokens).view(batch["input_ids"].shape), batch)


# --- Methods


def default_layers(depth: int) -> tuple[int, ...]:
    """About four layers, evenly over the second half of the language model, where answers are put together."""
    return tuple(range(depth // 2, depth, max(1, depth // 7)))


@register
class Attention(Heatmap):
    """Attention mass from the positions that predict the digits, averaged over digits, layers and heads.

    Only the answer's query rows are computed a second time, so this costs next to nothing.

    Args:
        layers, heads: None for `default_layers` and all heads; a ConfigError where the model has no such.
    """

    name = "attention"

    def __init__(self, network, layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None):
        super().__init__(network)
        text = network.config.text_config
        for name, chosen, number in (
            ("attention_layers", layers, text.num_hidden_layers), ("attention_heads", heads, text.num_attention_heads)
        ):  # fmt: skip
            if chosen is not None and not (chosen and all(0 <= i < number for i in chosen)):
                raise ConfigError(f"{name} is {chosen}, but this model has 0 to {number - 1}: choose at least one")
        self.layers, self.heads = layers or default_layers(text.num_hidden_layers), heads

    def mean_rows(self, rows: Rows) -> torch.Tensor:
        """[B, A, K], the mean of the chosen layers' and heads' rows [B, H, A, K]."""
        stacked = torch.stack([rows[layer] for layer in self.layers])  # [L, B, H, A, K]
        return (stacked if self.heads is None else stacked[:, :, list(self.heads)]).mean(dim=(0, 2))

    def mass(self, batch, create_graph=False, prompts=None):
        if prompts is None:
            logits, rows = answer_logits(self.network, batch, rows_of=self.layers)
        else:
            logits, rows = prompts.read_answers(batch, self.layers)
        return logits, digits_mass(self.mean_rows(rows), batch)


@register
class RelativeAttention(Attention):
    """`attention` over that for a neutral question (`prompt.NEUTRAL`), cell by cell: what is there anyhow cancels.

    After Zhang et al., "MLLMs Know Where to Look" (ICLR 2025).  The neutral attention is that of the position where
    an answer would begin.
    """

    name, trainable = "relative_attention", False

    def mass(self, batch, create_graph=False, prompts=None):
        logits, mass = super().mass(batch, prompts=prompts)
        with torch.no_grad():
            _, rows = answer_logits(self.network, with_neutral_question(batch), rows_of=self.layers)
        neutral = visual_mass(self.mean_rows(rows)[:, 0], batch)
        return logits, mass / neutral.clamp_min(torch.finfo(neutral.dtype).tiny)


def with_neutral_question(batch: Batch) -> Batch:
    """The batch with the neutral question behind each image, and the place where its answer begins as the answer."""
    tail = batch["neutral_tail"]  # [S]
    room = F.pad(batch["input_ids"], (0, len(tail)))  # [B, T + S]
    places = torch.arange(room.shape[1], device=room.device)
    visual = F.pad(batch["mm_token_type_ids"], (0, len(tail)))
    steps = places - (places * visual).amax(dim=1, keepdim=True) - 1  # [B, T + S] how far behind the image
    ids = torch.where(steps < 0, room, tail[steps.clamp(0, len(tail) - 1)])
    positions = F.pad(batch["position_ids"], (0, len(tail)))  # [3, B, T + S]
    first = positions.gather(2, (steps < 0).sum(dim=1)[None, :, None].expand(3, -1, -1))  # [3, B, 1]
    ends = (steps == len(tail) - 1).int().argmax(dim=1, keepdim=True)  # [B, 1]
    changed = {
        "input_ids": ids,
        "position_ids": torch.where(steps < 0, positions, first + steps),
        "answer_positions": ends,
    }
    return cast(Batch, {**batch, **changed})


@register
class TokenGradient(Heatmap):
    """|g * e| of each visual token, summed over channels: its features e, and the digits' gradient g.

    The gradient is that of their log-probability (gradient x input: Shrikumar et al., 2016).  Features that enter
    through deepstack count as parts of e.  The product is taken channel by channel: layers read a state only after
    normalising it, so that g . e, the effect of scaling the whole state, vanishes towards the last layers.
    """

    name, every, images = "token_gradient", 32, 8  # fewer looks, for they are dear (notebook 02)

    def mass(self, batch, create_graph=False, prompts=None):
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):  # compiled graphs are walked back once
            features = [differentiable(x) for x in encode_images(self.network, batch)]  # [V, C] each
            logits, _ = answer_logits(self.network, batch, features=features, second_derivative=create_graph)
            gradients = digits_gradient(logits, batch, features, create_graph)
            tokens = sum((x * g).abs().sum(dim=-1) for x, g in zip(features, gradients, strict=True))  # [V]
        return logits, tokens_mass(tokens, batch)


@register
class InputGradient(Heatmap):
    """|gradient| of the digits' log-probability with respect to the pixels, summed over each visual token's pixels.

    The first script's heatmap.  To train it the whole network is differentiated twice, frozen or not.
    """

    name, every, images = "input_gradient", 64, 4

    def mass(self, batch, create_graph=False, prompts=None):
        pixels = normalised_pixels(batch).detach().requires_grad_()  # [P, 3 * 2 * 16 * 16]
        batch = cast(Batch, {**batch, "pixel_values": pixels})
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            logits, _ = answer_logits(self.network, batch, second_derivative=create_graph)
            (gradient,) = digits_gradient(logits, batch, [pixels], create_graph)
        patches = self.network.config.vision_config.spatial_merge_size**2
        tokens = gradient.abs().sum(dim=-1).unflatten(0, (-1, patches)).sum(dim=-1)  # [V]: patches come token by token
        return logits, tokens_mass(tokens, batch)


def differentiable(x: torch.Tensor) -> torch.Tensor:
    """x itself where a gradient can reach it; else, below frozen weights, a new leaf of the same values."""
    return x if x.requires_grad else x.detach().requires_grad_()


def digits_gradient(logits, batch: Batch, inputs: list[torch.Tensor], create_graph: bool) -> tuple[torch.Tensor, ...]:
    """Gradients of the digits' log-probability; samples do not meet, so the sum over the batch serves them all."""
    score = digits_score(logits, batch).sum()
    return torch.autograd.grad(score, inputs, create_graph=create_graph, retain_graph=True)
