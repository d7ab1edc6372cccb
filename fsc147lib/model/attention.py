"""Attention that also hands on the answer's rows, registered with transformers under names of its own.

transformers calls a registered function in each layer, with rotated queries, keys and values and the layer's keywords.
"""

from contextlib import ExitStack, contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

# a vision implementation with "flash" in its name gets all images in a single call
IMPLEMENTATIONS = {"text_config": "sdpa_with_rows", "vision_config": "flash_or_sdpa_by_image"}
# without cuDNN's, which plans anew for each length
FAST_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_plain = AttentionInterface()["sdpa"]


def text_attention(
    module, query, key, value, attention_mask, look=None, scaling=None, second_derivative=False, **kwargs
):
    """transformers' `sdpa`; in layers with a `look`, attention rows [B, H, R, K] are added to it.

    query [B, H, Q, D], key and value [B, Hk, K, D], attention_mask [B, 1, Q, K] True where attended, None where causal;
    returns [B, Q, H, D] and None.  `look` holds the positions [B, R] of the queries, and a list for the rows; with a
    mask the rows are those of all queries.
    """
    with sdpa_kernel(SDPBackend.MATH if second_derivative else FAST_ATTENTION):
        output, _ = _plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if look is not None:
        positions, rows = look
        if attention_mask is None:
            index = positions[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            query = query.gather(2, index)  # [B, H, R, D]
            attention_mask = torch.arange(key.shape[2], device=key.device) <= positions[:, None, :, None]
        rows.append(attention_rows(query, key, attention_mask, scaling))
    return output, None


def attention_rows(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention probabilities by plain products, which have derivatives of any order.

    query [B, H, R, D], key [B, Hk, K, D] (each for H / Hk heads), seen [B, 1, R, K] True where attended; returns
    [B, H, R, K] float32, each row summing to 1.
    """
    with torch.autocast(query.device.type, enabled=False):  # the softmax needs float32
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

    `cu_seq_lens_q` [images + 1] holds the images' bounds, `max_length_q` the largest number of patches of an image.
    """
    # torch's variable-length attention has no second derivative
    if query.is_cuda and query.dtype.itemsize == 2 and not second_derivative:
        tokens = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))  # [P, H, D]
        bounds = cu_seq_lens_q
        return varlen_attn(*tokens, bounds, bounds, max_length_q, max_length_q, scale=scaling)[None], None
    with sdpa_kernel(SDPBackend.MATH if second_derivative else FAST_ATTENTION):
        return _image_by_image(query, key, value, cu_seq_lens_q, scaling), None


@torch.compiler.disable  # each number of images would be compiled
def _image_by_image(query, key, value, bounds, scaling):
    runs = [(length, len(list(run))) for length, run in groupby(bounds.diff().tolist())]  # images of one size, together
    parts = (x.squeeze(0).split([length * images for length, images in runs], dim=1) for x in (query, key, value))
    outputs = []
    for (_, images), *tensors in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (images, -1)).transpose(0, 1) for x in tensors)  # [images, H, length, D]
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)  # [1, P, H, D]


AttentionInterface.register(IMPLEMENTATIONS["text_config"], text_attention)
AttentionInterface.register(IMPLEMENTATIONS["vision_config"], vision_attention)
# without a mask function an implementation is given no mask of padding
AttentionMaskInterface.register(IMPLEMENTATIONS["text_config"], AttentionMaskInterface()["sdpa"])


@contextmanager
def rows_of_layers(network, layers: tuple[int, ...], positions: torch.Tensor):
    """A context that yields a dict, layer -> list; each pass of a layer appends its attention rows [B, H, R, K].

    R are the queries at `positions` [B, R].
    """
    found: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
    with ExitStack() as hooks:
        for i, rows in found.items():

            def give(_, args, kwargs, look=(positions, rows)):
                return args, {**kwargs, "look": look}

            layer = network.model.language_model.layers[i]
            hooks.enter_context(layer.register_forward_pre_hook(give, with_kwargs=True))
        yield found
