"""The two doors that all attention goes through: `probed_attention` (text) and `attention_by_size` (vision).

Both are registered with transformers' `AttentionInterface`, so that the library's own layers use them.

Left out: who asks, and what for (`forward`).
"""

from contextlib import nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TEXT_ATTENTION = "sdpa_with_probe"
VISION_ATTENTION = "flash_by_size"
"""The library hands all images to one call only where "flash" is in the name."""


def probed_attention(module, query, key, value, attention_mask, note=None, **kwargs):
    """The library's scaled-dot-product attention, which follows and fills a layer's note (see `forward.text_layer`).

    Probed rows cost R queries instead of T, so neither eager attention nor a [T, T] matrix is needed to see,
    or to train, where the model looks.  Without a past the output is the library's own.
    """
    note = {} if note is None else note
    if note.get("past") is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(note["past"], (key, value), strict=True))
    if note.get("keep"):
        note["kept"] = (key, value)
    if note.get("past") is not None:  # one query after many keys
        return weigh_values(attention_rows(module, query, key, attention_mask), value).to(query), None
    # the fast backends have no second derivative, the math backend has
    with sdpa_kernel(SDPBackend.MATH) if note.get("twice") else nullcontext():
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # [B, T, H, D]
    if note.get("queries") is not None:
        index = note["queries"][:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])  # [B, H, R, D]
        rows = attention_rows(module, query.gather(2, index), key, up_to(note["queries"], key.shape[2]))
        note["rows"] = rows
        if note.get("in_path"):
            output = output.scatter(1, index.transpose(1, 2), weigh_values(rows, value).to(output))
    return output, None


def up_to(positions: torch.Tensor, length: int) -> torch.Tensor:
    """What queries at positions [B, R] see of a sequence: [B, 1, R, T] True up to their own place."""
    return torch.arange(length, device=positions.device) <= positions[:, None, :, None]


def attention_rows(module, query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Probabilities of few queries, by plain products that can be differentiated as often as one likes.

    Args:
        module: the attention layer, for its scale.
        query: [B, H, R, D]; key: [B, Hk, T, D], each for H / Hk heads.
        seen: [B, 1, R, T] True where attended.

    Returns:
        [B, H, R, T] float32, each row summing to 1.
    """
    with torch.autocast(query.device.type, enabled=False):  # a softmax over hundreds of keys wants float32
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.to(wide).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, Hk, H/Hk * R, D]
        scores = query @ key.to(wide).transpose(2, 3) * module.scaling
        scores = scores.unflatten(2, (-1, seen.shape[2])).flatten(1, 2)  # [B, H, R, T]
        return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def weigh_values(rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What the queries of rows [B, H, R, T] read: value [B, Hk, T, D] -> [B, R, H, D] float32."""
    with torch.autocast(rows.device.type, enabled=False):
        read = rows.unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value.to(rows)  # [B, Hk, H/Hk * R, D]
        return read.unflatten(2, (-1, rows.shape[2])).flatten(1, 2).transpose(1, 2)


def attention_by_size(module, query, key, value, attention_mask, cu_seq_lens_q=None, twice=False, **kwargs):
    """Attention within each image: one call for each run of images of one size, none for each image.

    Args:
        query, key, value: [1, heads, P, D], the patches of all images one after the other.
        cu_seq_lens_q: [images + 1] where each image begins and the last ends; best on the CPU.
        twice: use the backend that has a second derivative.

    Returns:
        [1, P, heads, D].
    """
    if torch.compiler.is_compiling():  # sizes are data to a compiled block, or each mix would be compiled anew
        return _by_size_op(query, key, value, cu_seq_lens_q, module.scaling), None
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
        return _by_size(query, key, value, cu_seq_lens_q, module.scaling), None


def _by_size(query, key, value, bounds, scaling: float):
    runs = [(length, len(list(run))) for length, run in groupby(bounds.diff().tolist())]
    lengths = [length * number for length, number in runs]
    outputs = []
    for (length, _), *parts in zip(runs, *(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True):
        parts = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in parts)  # [images, heads, length, D]
        outputs.append(F.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


@torch.library.custom_op("fsc147lib::attention_by_size", mutates_args=())
def _by_size_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scaling: float
) -> torch.Tensor:
    return _by_size(query, key, value, bounds, scaling)


@_by_size_op.register_fake
def _(query, key, value, bounds, scaling):
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


AttentionInterface.register(TEXT_ATTENTION, probed_attention)
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
AttentionInterface.register(VISION_ATTENTION, attention_by_size)


def use_fast_attention(network) -> None:
    """Send a network's attention through the two doors (at loading, transformers would look for a flash package)."""
    network.model.language_model.config._attn_implementation = TEXT_ATTENTION
    network.model.visual.config._attn_implementation = VISION_ATTENTION
