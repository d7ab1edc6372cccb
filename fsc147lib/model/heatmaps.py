"""Methods that say where the model looks; a new one is a subclass of `Heatmap` given to `register`."""

from dataclasses import replace

import torch

from ..options import ConfigError
from .answers import digits_score
from .collate import Batch
from .forward import Prompts, Rows, answer_logits, encode_images, normalised_pixels, read_prompts

Maps = tuple[torch.Tensor, torch.Tensor]  # the answer's logits [B, A, V], and a mass or heatmap [B, 14, 14]


class Heatmap:
    """A method; a subclass has a `name` and computes `mass` with its `network`, a Qwen3-VL."""

    name: str
    trainable = True  # the mass has a useful gradient with respect to the weights
    every = 1  # default of `heatmap_every`: the attention loss is applied on each K-th step
    images: int | None = None  # default of `heatmap_images`: number of images of a batch; None is all

    def __init__(self, network):
        self.network = network

    def mass(self, batch: Batch, create_graph: bool = False, prompts: Prompts | None = None) -> Maps:
        """The answer's logits [B, A, V] and a non-negative mass [B, 14, 14] with any sum above 0.

        With `create_graph` the mass can be differentiated.  `prompts` are the batch's questions, if they are read.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its mass is computed")

    def with_logits(self, batch: Batch, create_graph: bool = False, prompts: Prompts | None = None) -> Maps:
        """`mass`, scaled to sum 1 for each image; ConfigError for `create_graph` if the method cannot be trained."""
        if create_graph and not self.trainable:
            choices = ", ".join(method_names(trainable=True))
            raise ConfigError(f"{self.name} is for looking, it has no useful gradient; train with one of {choices}")
        logits, mass = self.mass(batch, create_graph, prompts)
        mass = mass if create_graph else mass.detach()
        return logits, mass / mass.sum(dim=(1, 2), keepdim=True)

    def __call__(self, batch: Batch, create_graph: bool = False) -> torch.Tensor:
        """The heatmap [B, 14, 14] alone."""
        return self.with_logits(batch, create_graph)[1]


METHODS: dict[str, type[Heatmap]] = {}


def register(method: type[Heatmap]) -> type[Heatmap]:
    """Add a class to METHODS by its name, for all commands and notebooks; it replaces one of the same name."""
    METHODS[method.name] = method
    return method


def method_names(trainable: bool = False) -> tuple[str, ...]:
    """Names of all methods, or of those that can be trained."""
    return tuple(name for name, method in METHODS.items() if method.trainable or not trainable)


def make_heatmap(
    network, name: str = "attention", layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None
) -> Heatmap:
    """The method of a name; `layers` and `heads` are for methods that read attention.  ConfigError for unknown ones."""
    if name not in METHODS:
        raise ConfigError(f"heatmap is {name!r}, but must be one of {', '.join(METHODS)}")
    method = METHODS[name]
    if issubclass(method, Attention):
        return method(network, layers, heads)
    if layers is not None or heads is not None:
        raise ConfigError(f"{name} has no layers and heads to choose: leave attention_layers and attention_heads out")
    return method(network)


def visual_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Move mass on image positions in [B, ..., T] to the 14x14 grid, by exact areas: [B, ..., 14, 14]."""
    shape, length = (len(rows), *(1,) * (rows.ndim - 2)), rows.shape[-1]
    weights = (batch[key][..., :length].to(rows) for key in ("row_weights", "column_weights"))
    along_y, along_x = (each.unflatten(0, shape) for each in weights)  # [B, ..., 14, T]
    with torch.autocast(rows.device.type, enabled=False):  # a bf16 product would lose mass
        return (along_y * rows[..., : along_y.shape[-1]].unsqueeze(-2)) @ along_x.transpose(-1, -2)


def digits_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of the mean over the answer positions that predict a digit: [B, ..., A, T] -> [B, ..., 14, 14]."""
    weights = batch["digit_weights"].to(rows).unflatten(0, (len(rows), *(1,) * (rows.ndim - 3)))  # [B, ..., A]
    return visual_mass((weights.unsqueeze(-1) * rows).sum(dim=-2), batch)


def tokens_mass(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`visual_mass` of values of a batch's V visual tokens, image by image: [V] -> [B, 14, 14]."""
    visual = batch["mm_token_type_ids"]  # [B, T]
    order = (visual.flatten().cumsum(0) - 1).clamp_min(0).view_as(visual)  # of visual tokens, 0 to V - 1
    return visual_mass(tokens[order] * visual, batch)


def default_layers(depth: int) -> tuple[int, ...]:
    """About four layers, spread evenly over the second half of a language model with `depth` layers."""
    return tuple(range(depth // 2, depth, max(1, depth // 7)))


@register
class Attention(Heatmap):
    """Attention from the positions that predict the digits to the image, averaged over digits, layers and heads.

    None is `default_layers` and all heads.  A ConfigError names those that the model lacks.
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
        """The mean of the rows [B, H, A, K] over the method's layers and heads: [B, A, K]."""
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
    """`attention`, divided cell by cell by the attention of a neutral question's last token, which predicts its answer
    (Zhang et al., "MLLMs Know Where to Look", ICLR 2025).
    """

    name, trainable = "relative_attention", False

    @torch.no_grad()
    def mass(self, batch, create_graph=False, prompts=None):
        prompts = prompts or read_prompts(self.network, batch)
        logits, mass = super().mass(batch, prompts=prompts)
        visual = batch["mm_token_type_ids"][:, : prompts.seen.shape[1]]  # [B, K]
        seen = visual.flip(1).cumsum(1).flip(1) > 0  # up to the image's end, behind which the neutral question follows
        behind = batch["position_ids"].gather(2, seen.sum(dim=1)[None, :, None].expand(3, -1, -1))  # [3, B, 1]
        tail = batch["neutral_tail"].expand(len(visual), -1)  # [B, S]
        steps = torch.arange(tail.shape[1], device=tail.device)
        _, rows = replace(prompts, seen=seen).go_on(tail, behind + steps, (steps <= steps[:, None])[None], self.layers)
        prompts.forget(len(steps))
        neutral = visual_mass(self.mean_rows(rows)[:, -1], batch)
        return logits, mass / neutral.clamp_min(torch.finfo(neutral.dtype).tiny)


@register
class TokenGradient(Heatmap):
    """Gradient x input (Shrikumar et al., 2016) at the visual tokens: |g * e|, summed over channels.

    e are a token's features, deepstack included; g is the gradient of the digits' log-probability with respect to e.
    The sum g . e is nearly 0, since layers normalise their input.
    """

    name, every, images = "token_gradient", 32, 8  # the second derivative is slow, see notebook 02

    def mass(self, batch, create_graph=False, prompts=None):
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):  # compiled graphs are walked back once
            features = encode_images(self.network, batch)  # [V, C] each
            # below frozen weights no gradient reaches them
            features = [x if x.requires_grad else x.detach().requires_grad_() for x in features]
            logits, _ = answer_logits(self.network, batch, features=features, second_derivative=create_graph)
            gradients = digits_gradient(logits, batch, features, create_graph)
            tokens = sum((x * g).abs().sum(dim=-1) for x, g in zip(features, gradients, strict=True))  # [V]
        return logits, tokens_mass(tokens, batch)


@register
class InputGradient(Heatmap):
    """|gradient| of the digits' log-probability with respect to the pixels, summed over each visual token's pixels.

    Training differentiates the whole network twice, also if the vision encoder is frozen.
    """

    name, every, images = "input_gradient", 64, 4

    def mass(self, batch, create_graph=False, prompts=None):
        pixels = normalised_pixels(batch).detach().requires_grad_()  # [P, 3 * 2 * 16 * 16]
        batch = {**batch, "pixel_values": pixels}
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            logits, _ = answer_logits(self.network, batch, second_derivative=create_graph)
            (gradient,) = digits_gradient(logits, batch, [pixels], create_graph)
        patches = self.network.config.vision_config.spatial_merge_size**2
        tokens = gradient.abs().sum(dim=-1).unflatten(0, (-1, patches)).sum(dim=-1)  # [V]: patches come token by token
        return logits, tokens_mass(tokens, batch)


def digits_gradient(logits, batch: Batch, inputs: list[torch.Tensor], create_graph: bool) -> tuple[torch.Tensor, ...]:
    """Gradients of the digits' log-probability with respect to inputs of the images, each by its own answer's."""
    return torch.autograd.grad(digits_score(logits, batch).sum(), inputs, create_graph=create_graph, retain_graph=True)
