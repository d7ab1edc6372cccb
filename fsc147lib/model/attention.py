"""Attention that also hands on the answer's rows, registered with transformers.

transformers calls a registered function in each layer, with post-rotary queries, keys and values.  What the function
returns second leaves the layer by a forward hook on its attention.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATIONS = {"text_config": "sdpa_with_rows", "vision_config": "flash_or_sdpa_by_image"}
"""What a network is loaded with.  A vision implementation with "flash" in its name gets all images in one call."""

_plain = AttentionInterface()["sdpa"]


def text_attention(module, query, key, value, attention_mask, rows_of=(), rows_at=None, scaling=None, **kwargs):
    """transformers' `sdpa`; its second result is the attention rows of the positions that are looked at, or None.

    Args:
        query, key, value: [B, H, Q, D], [B, Hk, K, D] twice.
        attention_mask: [B, 1, Q, K] True where attended, or None for causal attention.
        rows_of: layers that are looked at.  A layer that is compiled whole is never one of them.
        rows_at: [B, R] positions that are looked at; with a mask all queries are.

    Returns:
        Output [B, Q, H, D], and rows [B, H, R, K] float32, each summing to 1.
    """
    output, _ = _plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # a compiled layer that reads its own index would be compiled once for each layer
    if torch.compiler.is_compiling() or module.layer_idx not in rows_of:
        return output, None
    if attention_mask is None:
        query = query.take_along_dim(rows_at[:, None, :, None], dim=2)  # [B, H, R, D]
        attention_mask = torch.arange(key.shape[2], device=key.device) <= rows_at[:, None, :, None]  # [B, 1, R, K]
    return output, attention_rows(query, key, attention_mask, scaling)


def attention_rows(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention probabilities by plain products, which have derivatives of any order.

    query [B, H, R, D], key [B, Hk, K, D] (each for H / Hk heads), seen [B, 1, R, K] True where attended; returns
    [B, H, R, K] float32, each row summing to 1.
    """
    with torch.autocast(query.device.type, enabled=False):  # a softmax over hundreds of keys wants float32
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.to(wide).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, Hk, H/Hk * R, D]
        scores = query @ key.to(wide).transpose(2, 3) * scaling
        scores = scores.unflatten(2, (-1, seen.shape[2])).flatten(1, 2)  # [B, H, R, K]
        return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def vision_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
    second_derivative=False, **kwargs,
):  # fmt: skip
    """Attention within each image, [1, H, P, D] each -> ([1, P, H, D], None).

    `cu_seq_lens_q` [images + 1] says where each image begins, `max_length_q` is the longest.  One call of torch's
    variable-length attention serves all images; it needs a GPU and half precision, and has no second derivative.
    """
    if query.is_cuda and query.dtype.itemsize == 2 and not second_derivative:
        tokens = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [P, H, D]
        bounds = cu_seq_lens_q
        return varlen_attn(*tokens, bounds, bounds, max_length_q, max_length_q, scale=scaling)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    images = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*image, scale=scaling) for image in images]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATIONS["text_config"], text_attention)
AttentionInterface.register(IMPLEMENTATIONS["vision_config"], vision_attention)
# without a mask function of its own an implementation would never see a mask, that of padding included
AttentionMaskInterface.register(IMPLEMENTATIONS["text_config"], AttentionMaskInterface()["sdpa"])


@contextmanager
def rows_of_layers(network, layers: tuple[int, ...]):
    """Within, passes write the rows [B, H, R, K] of the given layers into the dict that is handed out, layer -> rows.

    The hooks are gone afterwards: a backward pass that computes a checkpointed layer again must not meet them.
    """
    rows: dict[int, torch.Tensor] = {}

    def keep(module, _, output):
        rows[module.layer_idx] = output[1]

    attention = [network.model.language_model.layers[i].self_attn for i in layers]
    hooks = [module.register_forward_hook(keep) for module in attention]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
