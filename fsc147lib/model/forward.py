"""One forward pass, as training and evaluation need it: the library's layers, called without detours.

The sums are those of `network(...)` in transformers, against which the tests hold them.  What differs is
what stands between the layers: visual tokens are put in their places by an index that `collate` computed,
images of one size share one attention call, the last layer and the wide output head see the answer's
positions alone, and nothing on the way waits for the GPU.

Left out: attention itself (`attention`), loading (`model`), what probed rows mean (`heatmaps`), keeping
image features (`vision_cache`).
"""

import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextDecoderLayer,
    Qwen3VLVisionBlock,
    apply_rotary_pos_emb,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .attention import attention_rows, up_to, weigh_values
from .collate import Batch

VISION = -1
"""The vision encoder's place among the layers: below the language model's layer 0."""


@dataclass
class Probe:
    """Asks a forward pass for what it would not keep: attention rows, and the state that enters a layer.

    Attributes:
        queries: [B, R] positions of the rows in each sequence.
        layers: which layers of the language model to look at.
        rows: filled by the pass: layer -> [B, heads, R, T] float32, each row summing to 1 over the T
            keys up to its own position; part of the autograd graph where the pass has one.
        in_path: let the pass go on from these rows, so that its outputs have gradients with respect to
            them.  The numbers stay the same.
        entering: a layer whose incoming state is wanted, made differentiable; None for none.
        state: filled by the pass: that state, [B, T, C].
    """

    queries: torch.Tensor
    layers: tuple[int, ...] = ()
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    in_path: bool = False
    entering: int | None = None
    state: torch.Tensor | None = None


@dataclass
class ImageFeatures:
    """What the vision encoder says about a batch's V visual tokens, image after image.

    `embeddings` [V, C] stand in the sequence; `deepstack` [V, C] each are added after the language
    model's first layers.
    """

    embeddings: torch.Tensor
    deepstack: list[torch.Tensor]


# --- Layers, plain and compiled

# without the library's checkpointing around them, which would forget the note
_plain_text_layer = inspect.unwrap(Qwen3VLTextDecoderLayer.forward)
_plain_vision_block = inspect.unwrap(Qwen3VLVisionBlock.forward)


def text_layer(layer, hidden, cos, sin, mask=None, queries=None, in_path=False, twice=False, past=None, keep=False):
    """A layer of the language model.

    Args:
        layer: its module; hidden: [B, T, C]; cos, sin: [B, T, D] of the positions.
        mask: [B, 1, T, keys] True where attended; None for causal.
        queries: [B, R] positions whose attention rows are wanted.
        in_path, twice: see `Probe` and `answer_logits`.
        past: keys and values [B, Hk, K, D] that come before those of `hidden`.
        keep: return all keys and values.

    Returns:
        hidden [B, T, C]; rows [B, H, R, K + T] or None; (keys, values) or None.
    """
    note = {"queries": queries, "in_path": in_path, "twice": twice, "past": past, "keep": keep}
    hidden = _plain_text_layer(layer, hidden, position_embeddings=(cos, sin), attention_mask=mask, note=note)
    return hidden, note.get("rows"), note.get("kept")


def last_text_layer(layer, hidden, cos, sin, positions, keep=False):
    """The language model's last layer at the answer's positions [B, A] alone: nobody asks for the others.

    Keys and values are those of all positions; queries, and all that comes after the attention, are few.

    Returns:
        hidden [B, A, C]; rows [B, H, A, T]; (keys, values) if `keep`, else None.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    key = attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    query = attention.q_proj(_rows_at(normed, positions)).unflatten(-1, (-1, attention.head_dim))
    query = attention.q_norm(query).transpose(1, 2)  # [B, H, A, D]
    query, _ = apply_rotary_pos_emb(query, query, _rows_at(cos, positions), _rows_at(sin, positions))
    _, key = apply_rotary_pos_emb(key[:, :1], key, cos, sin)
    rows = attention_rows(attention, query, key, up_to(positions, hidden.shape[1]))
    read = weigh_values(rows, value).to(hidden).flatten(2)
    hidden = _rows_at(hidden, positions) + attention.o_proj(read)
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, rows, (key, value) if keep else None


def _rows_at(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, T, C] -> [B, A, C]."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def vision_block(block, hidden, cos, sin, bounds):
    """A block of the vision encoder: hidden [P, C] of all images, bounds [images + 1] on the CPU -> [P, C]."""
    return _plain_vision_block(block, hidden, cu_seqlens=bounds, max_seqlen=0, position_embeddings=(cos, sin))


@lru_cache
def _compiled(function):
    """Compiled once for all layers and sizes: a layer's weights are inputs, and no layer reads its own index."""
    torch._dynamo.config.recompile_limit = 32  # a dozen kinds of pass: with gradients or without, probed or not ...
    return torch.compile(function, dynamic=True)


def compile_layers(network, on: bool = True) -> None:
    """Let this module's passes through `network` compile its layers, at the first pass of each kind."""
    network.compiled_layers = on


def _is_compiled(network) -> bool:
    return getattr(network, "compiled_layers", False)


# --- The pass


def normalised_pixels(batch: Batch) -> torch.Tensor:
    """`pixel_values` as the network takes them, [P, 3 * 2 * 16 * 16] float; bytes are scaled where they lie."""
    pixels = batch["pixel_values"]
    if pixels.is_floating_point():
        return pixels
    mean, std = batch["pixel_scale"]  # [3] each
    colours = pixels.unflatten(1, (3, 1, -1)).to(mean.dtype) / 255  # [P, 3, 1, 16 * 16]
    return ((colours - mean[:, None, None]) / std[:, None, None]).expand(-1, -1, 2, -1).flatten(1)


def encode_images(network, batch: Batch, twice: bool = False) -> ImageFeatures:
    """The vision encoder's word on a batch's images, or what the batch brings along (`vision_cache`).

    Args:
        network: from `load_model`.
        batch: from `collate.Collate`, on the network's device.
        twice: make it differentiable twice.
    """
    if "image_features" in batch:  # [V, 1 + D, C]
        embeddings, *deepstack = batch["image_features"].unbind(1)
        return ImageFeatures(embeddings, deepstack)
    tower = network.model.visual
    hidden = _narrow(_embed_patches(tower, batch))  # [P, hidden]
    learned, (cos, sin) = _patch_positions(tower, batch["image_sizes"], hidden)
    hidden = hidden + learned
    bounds = torch.tensor([0, *accumulate(h * w for h, w in batch["image_sizes"])])
    compiled = _is_compiled(network) and not hidden.requires_grad
    deepstack = []
    for i, block in enumerate(tower.blocks):
        if compiled:
            hidden = _compiled(vision_block)(block, hidden, cos, sin, bounds)
        else:
            hidden = block(hidden, cu_seqlens=bounds, max_seqlen=0, position_embeddings=(cos, sin), twice=twice)
        if i in tower.deepstack_visual_indexes:
            deepstack.append(tower.deepstack_merger_list[len(deepstack)](hidden))
    return ImageFeatures(tower.merger(hidden), deepstack)


def _embed_patches(tower, batch: Batch) -> torch.Tensor:
    """Patches as vectors [P, hidden].  Bytes need no scaling and no second frame: both go into the weights."""
    pixels = batch["pixel_values"]
    if pixels.is_floating_point():
        return tower.patch_embed(pixels.to(tower.dtype))
    mean, std = (255 * batch["pixel_scale"]).repeat_interleave(pixels.shape[1] // 3, dim=1)  # [3 * 16 * 16] each
    projection = tower.patch_embed.proj
    weight = projection.weight.sum(dim=2).flatten(1) / std  # [hidden, 3 * 16 * 16]: the two frames are the same
    centred = pixels.to(weight.dtype).sub_(mean)  # a mean of 127.5 leaves numbers that bfloat16 holds exactly
    return F.linear(centred, weight.to(centred), projection.bias)


def _patch_positions(tower, sizes: list[tuple[int, int]], hidden: torch.Tensor):
    """What all patches' places say, as `hidden` [P, hidden] is: learned [P, hidden], rotary cos and sin [P, D].

    Worked out once for all images of one size.
    """
    distinct = list(dict.fromkeys(sizes))
    tables = [_tables_of_one(*size, tower.num_grid_per_side, hidden.device) for size in distinct]
    indices, weights, places = (torch.cat(parts) for parts in zip(*tables, strict=True))
    learned = (tower.pos_embed(indices) * weights[:, :, None]).sum(dim=1).to(hidden)  # [places, hidden]
    lengths = [height * width for height, width in distinct]

    def to_all(x: torch.Tensor) -> torch.Tensor:  # [places, C] -> [P, C]
        parts = dict(zip(distinct, x.split(lengths), strict=True))
        return torch.cat([parts[size] for size in sizes])

    return to_all(learned), [to_all(x) for x in tower.rotary_pos_emb(hidden, places)]


@lru_cache(maxsize=512)
def _tables_of_one(height: int, width: int, side: int, device) -> tuple[torch.Tensor, ...]:
    """Of an image's patches: corners in the learned grid [P, 4], their weights [P, 4], rows and columns [P, 2]."""
    grid = torch.tensor([[1, height, width]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, side, "bilinear", align_corners=True, spatial_merge_size=2
    )
    return tuple(table.to(device) for table in (indices, weights, get_vision_position_ids(grid, 2)))


def _narrow(hidden: torch.Tensor) -> torch.Tensor:
    """In autocast's type, so that the sum which runs through all layers is as narrow as their products."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def answer_logits(
    network,
    batch: Batch,
    probe: Probe | None = None,
    plain_from: int | None = None,
    twice: bool = False,
    images: ImageFeatures | None = None,
) -> torch.Tensor:
    """One forward pass; the wide output head is applied at the answer's positions alone.

    Args:
        network: from `load_model`.
        batch: from `collate.Collate`, on the network's device.
        probe: filled on the way.
        plain_from: first layer (VISION: the vision encoder) that is left as it is where the others are
            compiled, because somebody asks for its gradient before the backward pass.
        twice: let these layers have a second derivative; those below stay on the fast attention.
        images: None for `encode_images`.

    Returns:
        [B, A, V] logits of the tokens in `batch["answer_labels"]`.
    """
    model, index = network.model.language_model, batch["visual_index"]
    images = images or encode_images(network, batch, twice and plain_from == VISION)
    hidden = _narrow(model.embed_tokens(batch["input_ids"]))  # [B, T, C]
    hidden = hidden.flatten(0, 1).index_copy(0, index, images.embeddings.to(hidden)).view_as(hidden)
    cos, sin = model.rotary_emb(hidden, batch["position_ids"])
    answer = batch["answer_positions"]
    for i, layer in enumerate(model.layers):
        if probe and probe.entering == i:
            hidden = probe.state = differentiable(hidden)
        queries = probe.queries if probe and i in probe.layers else None
        plain = plain_from is not None and i >= plain_from
        asked = {"keep": "keys" in batch}
        last = i + 1 == len(model.layers) and i >= len(images.deepstack)
        if last and (queries is None or queries is answer):
            run = last_text_layer
            asked["positions"] = answer
        else:
            run = text_layer
            asked |= {"queries": queries, "in_path": queries is not None and probe.in_path, "twice": plain and twice}
        whole = run is text_layer
        run = _compiled(run) if _is_compiled(network) and not plain else run
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            hidden, rows, kept = checkpoint(run, layer, hidden, cos, sin, use_reentrant=False, **asked)
        else:
            hidden, rows, kept = run(layer, hidden, cos, sin, **asked)
        if queries is not None:
            probe.rows[i] = rows
        if kept is not None:
            batch["keys"].append(kept)
        if i < len(images.deepstack):
            features = images.deepstack[i].to(hidden)
            hidden = hidden.flatten(0, 1).index_add(0, index, features).view_as(hidden)
    return network.lm_head(model.norm(_rows_at(hidden, answer) if whole else hidden))


def differentiable(x: torch.Tensor) -> torch.Tensor:
    """x itself where a gradient can reach it; else, below frozen weights, a new leaf of the same values."""
    return x if x.requires_grad else x.detach().requires_grad_()
