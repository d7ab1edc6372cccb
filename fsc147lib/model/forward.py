"""Calls of transformers' network.

`answer_logits` is the pass of training, losses and maps.  `read_prompts` reads questions alone, and answers follow.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .attention import rows_of_layers
from .collate import Batch, need_right_padding

CACHE = (  # transformers 5.24 gave this argument a new name
    "cache" if "cache" in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters else "past_key_values"
)
Rows = dict[int, torch.Tensor]
"""Layer -> [B, H, A, K] float32 attention probabilities at the answer's positions, each row summing to 1."""


class ImageFeatures(NamedTuple):
    """Outputs of the vision encoder for V visual tokens, as `mm_encoder_outputs` takes them."""

    pooler_output: list[torch.Tensor]  # [V, C]: what stands in the sequence
    deepstack_features: list[list[torch.Tensor]]  # [V, C] each: added after the language model's first layers

    @classmethod
    def of(cls, tensors: list[torch.Tensor]) -> "ImageFeatures":
        """From the 1 + D tensors [V, C] of `encode_images`."""
        return cls([tensors[0]], [[x] for x in tensors[1:]])


def answer_logits(
    network,
    batch: Batch,
    *,
    rows_of: tuple[int, ...] = (),
    features: list[torch.Tensor] | None = None,
    second_derivative: bool = False,
) -> tuple[torch.Tensor, Rows]:
    """One pass over questions and answers; the output head is applied at the answer's positions alone.

    Args:
        network: from `load_model`.
        batch: from `Collate`, on the network's device; padding on the left is a ValueError.
        rows_of: layers of the language model that hand on their attention rows.
        features: of `encode_images`; None encodes the batch's images.
        second_derivative: attention gets a second derivative.

    Returns:
        [B, A, V] logits of the tokens in `batch["answer_labels"]`, and the rows.
    """
    need_right_padding(batch)
    answer = batch["answer_positions"]
    features = features or encode_images(network, batch, second_derivative=second_derivative)
    with rows_of_layers(network, rows_of, answer) as rows, narrow_embeddings(network):
        logits = network(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False,
            mm_encoder_outputs={"image": ImageFeatures.of(features)}, logits_to_keep=answer,
            second_derivative=second_derivative,
        ).logits  # fmt: skip
    return logits, {layer: found[0] for layer, found in rows.items()}


@contextmanager
def narrow_embeddings(network):
    """Within, the sum through all layers is bf16 where autocast is; not fp16, whose limit of 65,504 it may exceed."""
    embedding = network.get_input_embeddings()
    kind = embedding.weight.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.bfloat16:
        yield
        return
    hook = embedding.register_forward_hook(lambda _, __, output: output.to(torch.bfloat16))
    try:
        yield
    finally:
        hook.remove()


# --- Answers, token by token


@dataclass
class Prompts:
    """B questions as a network has read them, up to their last tokens, with which `go_on` begins."""

    network: torch.nn.Module
    cache: DynamicCache  # keys and values of K positions
    seen: torch.Tensor  # [B, K] True where a position belongs to the question
    last_token: torch.Tensor  # [B, 1]
    last_position: torch.Tensor  # [3, B, 1] M-RoPE

    def go_on(
        self,
        tokens: torch.Tensor,  # [B, S]
        positions: torch.Tensor,  # [3, B, S]
        attended: torch.Tensor,  # [B or 1, S, N + S] which of the N tokens since the question, and of these, are seen
        rows_of: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, Rows]:
        """Logits [B, S, V] after each of S tokens, and rows; the cache grows by S."""
        size = tokens.shape[1]
        question = self.seen[:, None].expand(-1, size, -1)  # [B, S, K]
        mask = torch.cat([question, attended.expand(len(tokens), -1, -1)], dim=2)[:, None]
        # layers that are compiled whole would be compiled once for each of their places in the cache
        eager, narrow = torch.compiler.set_stance("force_eager"), narrow_embeddings(self.network)
        with eager, narrow, rows_of_layers(self.network, rows_of, tokens) as rows:
            logits = self.network(
                input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=True, **{CACHE: self.cache}
            ).logits
        return logits, {layer: found[0] for layer, found in rows.items()}

    def forget(self, tokens: int) -> None:
        """Drop the keys of the last tokens."""
        self.cache.crop(-tokens)

    def read_answers(self, batch: Batch, rows_of: tuple[int, ...] = ()) -> tuple[torch.Tensor, Rows]:
        """`answer_logits` of the answers in a batch with these questions; the cache stays as it was."""
        tokens = batch["input_ids"].gather(1, batch["answer_positions"])  # [B, A]
        size = tokens.shape[1]
        positions = self.last_position + torch.arange(size, device=tokens.device)
        causal = torch.ones(1, size, size, dtype=torch.bool, device=tokens.device).tril()
        found = self.go_on(tokens, positions, causal, rows_of)
        self.forget(size)
        return found

    def greedy(self, longest: int, end: int) -> torch.Tensor:
        """The most probable tokens, one by one: [B, up to `longest`] int64; after an `end` all are `end`."""
        token, tokens = self.last_token, []
        for step in range(longest):
            attended = torch.ones(1, 1, step + 1, dtype=torch.bool, device=token.device)
            logits, _ = self.go_on(token, self.last_position + step, attended)
            token = torch.where(token == end, end, logits.argmax(dim=-1)) if step else logits.argmax(dim=-1)
            tokens.append(token)
            if (token == end).all():
                break
        self.forget(len(tokens))
        return torch.cat(tokens, dim=1)


@torch.no_grad()
def read_prompts(network, batch: Batch) -> Prompts:
    """A pass over the questions of a batch, without its answers."""
    need_right_padding(batch)
    last = batch["answer_positions"][:, :1]  # [B, 1] the question's last token
    length = int(last.max())
    cache = DynamicCache(config=network.config.text_config)
    features = encode_images(network, batch)
    with torch.compiler.set_stance("force_eager"), narrow_embeddings(network):
        network(
            input_ids=batch["input_ids"][:, :length], position_ids=batch["position_ids"][:, :, :length],
            mm_encoder_outputs={"image": ImageFeatures.of(features)}, use_cache=True, logits_to_keep=1,
            **{CACHE: cache},
        )  # fmt: skip
    seen = torch.arange(length, device=last.device) < last
    position = batch["position_ids"].gather(2, last.expand(3, -1, -1))
    return Prompts(network, cache, seen, batch["input_ids"].gather(1, last), position)


# --- Vision encoder


def normalised_pixels(batch: Batch) -> torch.Tensor:
    """`pixel_values` as the network takes them, [P, 3 * 2 * 16 * 16] float; bytes are scaled on their device."""
    pixels = batch["pixel_values"]
    if pixels.is_floating_point():
        return pixels
    mean, std = batch["pixel_scale"]  # [3] each
    colours = pixels.unflatten(1, (3, 1, -1)).to(mean.dtype) / 255  # [P, 3, 1, 16 * 16]
    return ((colours - mean[:, None, None]) / std[:, None, None]).expand(-1, -1, 2, -1).flatten(1)


def encode_images(network, batch: Batch, second_derivative: bool = False) -> list[torch.Tensor]:
    """1 + D outputs [V, C] of the vision encoder for a batch's images, or the batch's own `image_features`.

    First the embeddings in the sequence, then the deepstack features for the first D layers.
    """
    if "image_features" in batch:  # [V, 1 + D, C]
        return list(batch["image_features"].unbind(1))
    pixels, sizes = normalised_pixels(batch), batch["image_sizes"]
    lengths = [height * width for height, width in sizes]
    bounds = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))  # [images + 1]
    grid = torch.tensor([(1, *size) for size in sizes])  # on the CPU, where reading it waits for nothing
    found = network.model.get_image_features(
        pixels, grid, return_dict=True, cu_seqlens=bounds.to(pixels.device), max_seqlen=max(lengths),
        second_derivative=second_derivative, **_patch_positions(network, sizes, pixels.device),
    )  # fmt: skip
    return [torch.cat(x) for x in (found.pooler_output, *found.deepstack_features)]


def _patch_positions(network, sizes: list[tuple[int, int]], device) -> dict[str, torch.Tensor]:
    """Positions of all patches, which `get_image_features` would compute in each pass, and wait for."""
    tower = network.model.visual
    tables = [_positions_of_one(*size, tower.num_grid_per_side, tower.spatial_merge_size, device) for size in sizes]
    names = "interp_indices", "interp_weights", "position_ids"
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*tables, strict=True), strict=True)}


@lru_cache(maxsize=512)
def _positions_of_one(height: int, width: int, side: int, merge: int, device) -> tuple[torch.Tensor, ...]:
    """Of P patches: corners in the learned grid [P, 4], their weights [P, 4], rows and columns [P, 2]."""
    grid = torch.tensor([[1, height, width]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, side, "bilinear", align_corners=True, spatial_merge_size=merge
    )
    return tuple(table.to(device) for table in (indices, weights, get_vision_position_ids(grid, merge)))
