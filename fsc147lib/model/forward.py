"""One forward pass, as training and evaluation need it: transformers' modules, called without detours.

The sums are those of `network(...)` in transformers, against which the tests hold them.  What differs is what
stands between the layers: visual tokens are put in their places by an index that `collate` computed, images of one
size share one attention call, the last layer and the wide output head see the answer's positions alone, and nothing
waits for the GPU.  Left out: the layers themselves (`layers`), what attention rows mean (`heatmaps`).
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .collate import Batch, need_right_padding
from .layers import KeysValues, run_layer, select_positions, text_layer, vision_block

VISION = -1  # the vision encoder's place among the layers: below the language model's layer 0


@dataclass
class Trace:
    """What a forward pass computed beside its logits, as far as `answer_logits` was asked for it; with its graph."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> [B, H, A, T] float32 attention probabilities at the answer's positions, each row summing to 1."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """What enters the layers from `gradient_from` on: the hidden state [B, T, C], and the deepstack features [V, C]
    that are added after that layer or a later one."""
    keys_values: list[KeysValues] = field(default_factory=list)
    """Of each layer."""


def answer_logits(
    network,
    batch: Batch,
    *,
    rows_of: tuple[int, ...] = (),
    rows_in_output: bool = False,
    gradient_from: int | None = None,
    create_graph: bool = False,
    keeps_graph: bool = True,
    shift: list[torch.Tensor] | None = None,
    keep_keys: bool = False,
    compiled: bool = False,
) -> tuple[torch.Tensor, Trace]:
    """One forward pass; the wide output head is applied at the answer's positions alone.

    Args:
        network: from `load_model`.
        batch: from `collate.Collate`, on the network's device; ValueError where it is padded on the left.
        rows_of: layers of the language model whose attention rows are traced.
        rows_in_output: let the pass go on from these rows, so that its logits have gradients with respect to
            them.  The numbers stay the same.
        gradient_from: first layer (VISION: the vision encoder) that the caller differentiates before the backward
            pass.
        keeps_graph: whether that derivative leaves the graph for the backward pass; compiled layers cannot.
        create_graph: let these layers have a second derivative; those below stay on the fast attention.
        shift: moves what enters the layers from `gradient_from` on; a tensor for each of the trace's `inputs`, which
            stay as they were before.
        keep_keys: trace all layers' keys and values.

    Returns:
        [B, A, V] logits of the tokens in `batch["answer_labels"]`, and the trace.
    """
    need_right_padding(batch)
    model, trace = network.model.language_model, Trace()
    answer, visual = batch["answer_positions"], batch["visual_index"]
    first = len(model.layers) if gradient_from is None else gradient_from
    graph = create_graph and first == VISION
    embeddings, *deepstack = encode_images(network, batch, create_graph=graph, compiled=compiled)
    if first != VISION:
        deepstack[first:] = [_differentiable(features) for features in deepstack[first:]]
    hidden = _in_autocast_dtype(model.embed_tokens(batch["input_ids"]))  # [B, T, C]
    hidden = _in_places(torch.index_copy, hidden, visual, embeddings)
    cos, sin = model.rotary_emb(hidden, batch["position_ids"])
    for i, layer in enumerate(model.layers):
        if i == first:
            hidden = _differentiable(hidden)
            trace.inputs = [hidden, *deepstack[i:]]
            if shift is not None:
                hidden, *deepstack[i:] = (x + by for x, by in zip(trace.inputs, shift, strict=True))
        last = i + 1 == len(model.layers) and i >= len(deepstack)
        hidden, rows, keys_values = run_layer(
            text_layer, layer, hidden, cos, sin, compiled=compiled and not (i >= first and keeps_graph),
            only_at=answer if last else None, rows_at=answer if i in rows_of and not last else None,
            rows_in_output=rows_in_output, create_graph=create_graph and i >= first, keep_keys=keep_keys,
        )  # fmt: skip
        if i in rows_of:
            trace.rows[i] = rows
        if keep_keys:
            trace.keys_values.append(keys_values)
        if i < len(deepstack):
            hidden = _in_places(torch.index_add, hidden, visual, deepstack[i])
    hidden = hidden if last else select_positions(hidden, answer)
    return network.lm_head(model.norm(hidden)), trace


def continue_pass(
    network,
    tokens: torch.Tensor,  # [B, S]
    position_ids: torch.Tensor,  # [3, B, S]
    seen: torch.Tensor,  # [B, 1, S, K + S] which of the past's K positions, and of the tokens, are attended to
    past: list[KeysValues],  # of each layer
    *,
    rows_of: tuple[int, ...] = (),
    compiled: bool = False,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Going on after a pass that kept its keys, by some tokens: their logits [B, S, V], and of layers `rows_of` the
    attention rows, layer -> [B, H, S, K + S].  Their keys and values are put behind those of the past.
    """
    model, rows = network.model.language_model, {}
    hidden = _in_autocast_dtype(model.embed_tokens(tokens))
    cos, sin = model.rotary_emb(hidden, position_ids)
    for i, layer in enumerate(model.layers):
        hidden, found, past[i] = run_layer(
            text_layer, layer, hidden, cos, sin, compiled=compiled, past=past[i], seen=seen, keep_keys=True
        )
        if i in rows_of:
            rows[i] = found
    return network.lm_head(model.norm(hidden)), rows


def _differentiable(x: torch.Tensor) -> torch.Tensor:
    """x itself where a gradient can reach it; else, below frozen weights, a new leaf of the same values."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _in_places(put, hidden: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, T, C] with values [V, C] put to, or added at, places of all B * T.

    A tensor of its own: torch 2.11 compiled a layer once for views and once more for what is none.
    """
    return put(hidden.flatten(0, 1), 0, index, values.to(hidden)).view_as(hidden).clone()


def _in_autocast_dtype(hidden: torch.Tensor) -> torch.Tensor:
    """In autocast's type, so that the sum which runs through all layers is as narrow as their products.

    Not in fp16, which ends at 65,504: single numbers of that sum come near it in large models.
    """
    kind = hidden.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float16
    return hidden if narrow == torch.float16 else hidden.to(narrow)


# --- Vision encoder


def normalised_pixels(batch: Batch) -> torch.Tensor:
    """`pixel_values` as the network takes them, [P, 3 * 2 * 16 * 16] float; bytes are scaled where they lie."""
    pixels = batch["pixel_values"]
    if pixels.is_floating_point():
        return pixels
    mean, std = batch["pixel_scale"]  # [3] each
    colours = pixels.unflatten(1, (3, 1, -1)).to(mean.dtype) / 255  # [P, 3, 1, 16 * 16]
    return ((colours - mean[:, None, None]) / std[:, None, None]).expand(-1, -1, 2, -1).flatten(1)


def encode_images(network, batch: Batch, *, create_graph: bool = False, compiled: bool = False) -> list[torch.Tensor]:
    """Outputs of the vision encoder for a batch's V visual tokens, or those that the batch brings along.

    They are 1 + D times [V, C]: the embeddings that stand in the sequence, and the deepstack features that are added
    after the language model's first D layers.  Blocks are compiled only where they need no gradient.
    """
    if "image_features" in batch:  # [V, 1 + D, C], see `vision_cache`
        return list(batch["image_features"].unbind(1))
    tower = network.model.visual
    hidden = _in_autocast_dtype(_embed_patches(tower, batch))  # [P, hidden]
    learned, (cos, sin) = _patch_positions(tower, batch["image_sizes"], hidden)
    hidden = hidden + learned
    bounds = torch.tensor([0, *accumulate(h * w for h, w in batch["image_sizes"])])
    compiled = compiled and not hidden.requires_grad
    deepstack: list[torch.Tensor] = []
    with torch.no_grad() if compiled else nullcontext():  # training and answering then share one kind of graph
        for i, block in enumerate(tower.blocks):
            hidden = run_layer(
                vision_block, block, hidden, cos, sin, bounds, compiled=compiled, create_graph=create_graph
            )
            if i in tower.deepstack_visual_indexes:
                deepstack.append(tower.deepstack_merger_list[len(deepstack)](hidden))
        return [tower.merger(hidden), *deepstack]


def _embed_patches(tower, batch: Batch) -> torch.Tensor:
    """Patches as vectors [P, hidden], by a matrix product: the Conv3d covers each patch with exactly one kernel.

    Bytes need no scaling and no second frame: both go into the weights.
    """
    pixels, projection = batch["pixel_values"], tower.patch_embed.proj
    if pixels.is_floating_point():
        return F.linear(pixels.to(projection.weight), projection.weight.flatten(1), projection.bias)
    mean, std = (255 * batch["pixel_scale"]).repeat_interleave(pixels.shape[1] // 3, dim=1)  # [3 * 16 * 16] each
    weight = projection.weight.sum(dim=2).flatten(1) / std  # [hidden, 3 * 16 * 16]: the two frames are the same
    centred = pixels.to(weight.dtype).sub_(mean)  # a mean of 127.5 leaves numbers that bfloat16 holds exactly
    return F.linear(centred, weight.to(centred), projection.bias)


def _patch_positions(tower, sizes: list[tuple[int, int]], hidden: torch.Tensor):
    """Position embeddings of all patches: learned [P, hidden], as `hidden` is, rotary cos and sin [P, D]."""
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
