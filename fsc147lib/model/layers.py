"""Qwen3-VL's two kinds of layer, written out over transformers' modules: `text_layer` and `vision_block`.

transformers' own forward methods return neither attention rows nor keys, compute all positions of the last layer,
and attend to images one by one.  These are all that is restated of transformers; `tests/model/test_forward.py`
holds outputs and gradients against the plain network.  Left out: the pass through all layers (`forward`).
"""

from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby

import torch
import torch._inductor.config
import torch.fx.experimental._config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision, rotate_half

KeysValues = tuple[torch.Tensor, torch.Tensor]  # of a layer, [B, Hk, T, D] each


def run_layer(function, layer, *inputs, compiled: bool = False, **kwargs):
    """`function(layer, *inputs, **kwargs)`, compiled on request, checkpointed where the layer is set to."""
    function = _compile(function) if compiled else function
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return checkpoint(function, layer, *inputs, use_reentrant=False, **kwargs)
    return function(layer, *inputs, **kwargs)


@lru_cache
def _compile(function):
    """Compiled once for all layers and sizes: a layer's weights are inputs, and no layer reads its own index."""
    torch._dynamo.config.recompile_limit = 32  # a dozen kinds of pass: with gradients or without, with rows or not ...
    torch._dynamo.config.fake_tensor_cache_enabled = False  # for sizes that vary it costs more than it saves
    torch._dynamo.config.specialize_float = True  # scales and epsilons never change; else the first trace is made twice
    torch.fx.experimental._config.use_duck_shape = False  # as many images as a head is wide: that is chance
    marks = {f"torch.amp.autocast_mode._{end}_autocast": torch.__version__ for end in ("enter", "exit")}
    torch._inductor.config.unsafe_marked_cacheable_functions.update(marks)  # or a later run compiles rows anew
    return torch.compile(function, dynamic=True)


# --- Language model


def text_layer(
    layer,
    hidden: torch.Tensor,  # [B, T, C]
    cos: torch.Tensor,  # [B, T, D] of the positions, as sin
    sin: torch.Tensor,
    *,
    only_at: torch.Tensor | None = None,  # [B, A] positions whose output alone is wanted; None for all
    rows_at: torch.Tensor | None = None,  # [B, R] positions whose attention rows are wanted beside those of `only_at`
    rows_in_output: bool = False,  # compute these positions' output from the rows: the same, with a gradient for them
    create_graph: bool = False,  # let the attention have a second derivative
    keep_keys: bool = False,
    past: KeysValues | None = None,  # of what comes before `hidden`, which is then a few new tokens
    seen: torch.Tensor | None = None,  # with `past`: [B, 1, T, K + T] True where attended
) -> tuple[torch.Tensor, torch.Tensor | None, KeysValues | None]:
    """A layer of the language model: causal attention and a gated MLP, each added to its input.

    Returns hidden [B, T or A, C]; rows [B, H, R, T] float32, each summing to 1, or None; keys and values, or None.
    """
    attention, normed, rows = layer.self_attn, layer.input_layernorm(hidden), None
    all_positions = only_at is None and past is None
    query = _queries(attention, normed, cos, sin) if all_positions else None
    kept = key, value = _keys_values(attention, normed, cos, sin)
    if all_positions:  # by the fast kernels, and a few positions' rows beside them
        # the fast backends have no second derivative, the math backend has
        with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
            grouped = query.shape[1] != key.shape[1]
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=grouped
            ).transpose(1, 2)  # [B, T, H, D]
        if rows_at is not None:
            index = rows_at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])  # [B, H, R, D]
            rows = attention_rows(query.gather(2, index), key, up_to(rows_at, key.shape[2]), attention.scaling)
            if rows_in_output:
                output = output.scatter(1, index.transpose(1, 2), weigh_values(rows, value).to(output))
    else:  # few queries after many keys, by plain products
        if past is not None:
            kept = key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        else:
            seen = up_to(only_at, key.shape[2])
            hidden, normed, cos, sin = (select_positions(x, only_at) for x in (hidden, normed, cos, sin))
        rows = attention_rows(_queries(attention, normed, cos, sin), key, seen, attention.scaling)
        output = weigh_values(rows, value).to(normed)
    hidden = hidden + attention.o_proj(output.flatten(2))
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    # in one layout, or decoding would be compiled once for a pass's own keys and again for those with more behind
    return hidden, rows, tuple(x.contiguous() for x in kept) if keep_keys else None


def select_positions(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, T, C] at positions [B, A] -> [B, A, C]."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def _queries(attention, hidden, cos, sin) -> torch.Tensor:
    """[B, T, C] -> [B, H, T, D]."""
    heads = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    return _rotated(attention.q_norm(heads).transpose(1, 2), cos, sin)


def _keys_values(attention, hidden, cos, sin) -> KeysValues:
    heads = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    key = _rotated(attention.k_norm(heads).transpose(1, 2), cos, sin)
    return key, attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rotated(heads, cos, sin) -> torch.Tensor:
    """Rotary positions (Su et al., "RoFormer", 2021): heads [B, H, T, D], cos and sin [B, T, D]."""
    return heads * cos[:, None] + rotate_half(heads) * sin[:, None]


def up_to(positions: torch.Tensor, length: int) -> torch.Tensor:
    """The causal mask of queries at positions [B, R] in a sequence: [B, 1, R, T] True up to their own place."""
    return torch.arange(length, device=positions.device) <= positions[:, None, :, None]


def attention_rows(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention probabilities of few queries, by plain products that can be differentiated as often as one likes.

    query [B, H, R, D], key [B, Hk, T, D] (each for H / Hk heads), seen [B, 1, R, T] True where attended; returns
    [B, H, R, T] float32, each row summing to 1.
    """
    with torch.autocast(query.device.type, enabled=False):  # a softmax over hundreds of keys wants float32
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.to(wide).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, Hk, H/Hk * R, D]
        scores = query @ key.to(wide).transpose(2, 3) * scaling
        scores = scores.unflatten(2, (-1, seen.shape[2])).flatten(1, 2)  # [B, H, R, T]
        return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def weigh_values(rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention output of rows [B, H, R, T] over values [B, Hk, T, D]: [B, R, H, D] float32."""
    with torch.autocast(rows.device.type, enabled=False):
        read = rows.unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value.to(rows)  # [B, Hk, H/Hk * R, D]
        return read.unflatten(2, (-1, rows.shape[2])).flatten(1, 2).transpose(1, 2)


# --- Vision encoder


def vision_block(
    block, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bounds: torch.Tensor, *, create_graph=False
) -> torch.Tensor:
    """A block of the vision encoder: attention within each image and an MLP, each added to its input; [P, C].

    cos, sin [P, D] are those of the patches, and `bounds` [images + 1] on the CPU where each image begins and the last
    ends; `create_graph` lets the attention have a second derivative.
    """
    attention = block.attn
    heads = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))  # [P, 3, H, D]
    query, key, value = heads.permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # [H, P, D]
    output = attention_by_size(query, key, value, bounds, attention.scaling, create_graph)
    hidden = hidden + attention.proj(output.flatten(1))
    return hidden + block.mlp(block.norm2(hidden))


def attention_by_size(query, key, value, bounds: torch.Tensor, scaling: float, create_graph: bool = False):
    """Attention within each image, [H, P, D] each -> [P, H, D]; one call for each run of images of one size."""
    if torch.compiler.is_compiling():  # sizes are data to a compiled block, or each mix would be compiled anew
        return _by_size_op(query, key, value, bounds, scaling)
    with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        return _by_size(query, key, value, bounds, scaling)


def _by_size(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scaling: float
) -> torch.Tensor:
    runs = [(length, len(list(run))) for length, run in groupby(bounds.diff().tolist())]
    lengths = [length * number for length, number in runs]
    outputs = []
    for (length, _), *parts in zip(runs, *(x.split(lengths, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in parts)  # [images, H, length, D]
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


_by_size_op = torch.library.custom_op("fsc147lib::attention_by_size", _by_size, mutates_args=())
_by_size_op.register_fake(lambda query, *_: query.new_empty(query.shape[1], query.shape[0], query.shape[2]))
