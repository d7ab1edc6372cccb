"""Calls of transformers' network: a pass over questions and answers, and passes that go on from questions alone.

`answer_logits` is the pass of training, losses and maps.  `read_prompts` keeps a pass over the questions, from which
answers are read or written token by token.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .attention import rows_of_layers
from .collate import Batch, need_right_padding

ARGUMENTS = inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"  # renamed by transformers 5.24

# layer -> [B, H, A, K] float32 attention probabilities at the answer's positions, each row summing to 1
Rows = dict[int, torch.Tensor]


def answer_logits(
    network, batch: Batch, *, rows_of: tuple[int, ...] = (), features: list[torch.Tensor] | None = None,
    second_derivative: bool = False,
) -> tuple[torch.Tensor, Rows]:  # fmt: skip
    """One pass over questions and answers: logits [B, A, V] of the tokens in `answer_labels`, and rows of some layers.

    `features` are those of `encode_images`; None encodes the batch's images.  With `second_derivative` the logits have
    one.  ValueError for a batch on the CPU with padding on the left.
    """
    need_right_padding(batch)  # causal attention hides padding on the right
    answer, features = batch["answer_positions"], features or encode_images(network, batch, second_derivative)
    return _call(
        network, rows_of, answer, features, input_ids=batch["input_ids"], position_ids=batch["position_ids"],
        use_cache=False, logits_to_keep=answer, second_derivative=second_derivative,
    )  # fmt: skip


def _call(
    network, rows_of: tuple[int, ...], positions: torch.Tensor, features: list[torch.Tensor] | None = None, **inputs
) -> tuple[torch.Tensor, Rows]:
    """Logits of the network, and attention rows of some layers at positions [B, R]."""
    if features is not None:
        embeddings, stacked = features[0], [[x] for x in features[1:]]
        outputs = BaseModelOutputWithDeepstackFeatures(pooler_output=[embeddings], deepstack_features=stacked)
        inputs["mm_encoder_outputs"] = {"image": outputs}
    embedding, narrow = network.get_input_embeddings(), nullcontext()
    kind = embedding.weight.device.type
    # The sum through all layers is as narrow as autocast's products, but for fp16, which ends at 65,504: single numbers
    # of that sum come near it in large models.  The handle of a hook is a context that removes it.
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        narrow = embedding.register_forward_hook(lambda _, __, output: output.to(torch.bfloat16))
    with narrow, rows_of_layers(network, rows_of, positions) as rows:
        logits = network(**inputs).logits
    return logits, {layer: found[0] for layer, found in rows.items()}


@dataclass
class Prompts:
    """B questions that a network has read, but for the last token of each, which the first pass of `go_on` reads."""

    network: torch.nn.Module
    cache: DynamicCache  # keys and values of K positions
    seen: torch.Tensor  # [B, K] True where a position belongs to the question
    last_token: torch.Tensor  # [B, 1]
    last_position: torch.Tensor  # [3, B, 1] M-RoPE

    def go_on(
        self, tokens: torch.Tensor, positions: torch.Tensor, attended: torch.Tensor, rows_of: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, Rows]:
        """Read S more tokens [B, S] with M-RoPE positions [3, B, S]; their keys are added to the cache.

        `attended` [B or 1, S, N + S] is True where a token attends to one of the N tokens since the question, or of
        these S.  Returns logits [B, S, V] of the token after each, and the attention rows of the layers `rows_of`.
        """
        question = self.seen[:, None].expand(-1, tokens.shape[1], -1)  # [B, S, K]
        mask = torch.cat([question, attended.expand(len(tokens), -1, -1)], dim=2)[:, None]
        with torch.compiler.set_stance("force_eager"):  # a layer would be compiled for each of its places in the cache
            return _call(
                self.network, rows_of, tokens, input_ids=tokens, position_ids=positions, attention_mask=mask,
                use_cache=True, **{CACHE: self.cache},
            )  # fmt: skip

    def forget(self, tokens: int) -> None:
        """Drop the keys of the last tokens, a number of them."""
        self.cache.crop(-tokens)

    def read_answers(self, batch: Batch, rows_of: tuple[int, ...] = ()) -> tuple[torch.Tensor, Rows]:
        """`answer_logits` of a batch with these questions and any answers; the cache stays as it was."""
        tokens = batch["input_ids"].gather(1, batch["answer_positions"])  # [B, A]
        size = tokens.shape[1]
        positions = self.last_position + torch.arange(size, device=tokens.device)
        causal = torch.ones(1, size, size, dtype=torch.bool, device=tokens.device).tril()
        found = self.go_on(tokens, positions, causal, rows_of)
        self.forget(size)
        return found

    def greedy(self, longest: int, end: int) -> torch.Tensor:
        """The most probable token, again and again: [B, up to `longest`] int64; an answer that has ended repeats `end`.

        The cache stays as it was.
        """
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
    """Read the questions of a batch; its answers are ignored.  ValueError if it has padding on the left."""
    need_right_padding(batch)
    last = batch["answer_positions"][:, :1]  # [B, 1] the question's last token
    length, cache = int(last.max()), DynamicCache(config=network.config.text_config)
    ids, positions = batch["input_ids"][:, :length], batch["position_ids"][:, :, :length]
    features, asked = encode_images(network, batch), {"use_cache": True, "logits_to_keep": 1, CACHE: cache}
    with torch.compiler.set_stance("force_eager"):
        _call(network, (), last, features, input_ids=ids, position_ids=positions, **asked)
    seen = torch.arange(length, device=last.device) < last
    position = batch["position_ids"].gather(2, last.expand(3, -1, -1))
    return Prompts(network, cache, seen, batch["input_ids"].gather(1, last), position)


def normalised_pixels(batch: Batch) -> torch.Tensor:
    """`pixel_values` as the network takes them, [P, 3 * 2 * 16 * 16] float; bytes are scaled on their device."""
    pixels = batch["pixel_values"]
    if pixels.is_floating_point():
        return pixels
    mean, std = batch["pixel_scale"]  # [3] each
    colours = pixels.unflatten(1, (3, 1, -1)).to(mean.dtype) / 255  # [P, 3, 1, 16 * 16]
    return ((colours - mean[:, None, None]) / std[:, None, None]).expand(-1, -1, 2, -1).flatten(1)


def encode_images(network, batch: Batch, second_derivative: bool = False) -> list[torch.Tensor]:
    """The vision encoder's 1 + D outputs [V, C] for a batch's visual tokens; a batch with `image_features` gives those.

    They are the embeddings in the sequence, and the deepstack features that the first D layers add.
    """
    if "image_features" in batch:  # [V, 1 + D, C]
        return list(batch["image_features"].unbind(1))
    pixels, sizes = normalised_pixels(batch), batch["image_sizes"]
    lengths = [height * width for height, width in sizes]
    bounds = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))  # [images + 1]
    grid = torch.tensor([(1, *size) for size in sizes])  # on the CPU, where reading it waits for nothing
    tower = network.model.visual
    tables = [_places_of_one(*size, tower.num_grid_per_side, tower.spatial_merge_size, pixels.device) for size in sizes]
    indices, weights, positions = map(torch.cat, zip(*tables, strict=True))
    found = network.model.get_image_features(
        pixels, grid, return_dict=True, cu_seqlens=bounds.to(pixels.device), max_seqlen=max(lengths),
        interp_indices=indices, interp_weights=weights, position_ids=positions, second_derivative=second_derivative,
    )  # fmt: skip
    return [torch.cat(x) for x in (found.pooler_output, *found.deepstack_features)]


@lru_cache(maxsize=512)  # transformers would compute them anew, and wait for them, in each pass
def _places_of_one(height: int, width: int, side: int, merge: int, device) -> tuple[torch.Tensor, ...]:
    """Of an image's P patches: corners in the learned grid [P, 4], their weights [P, 4], rows and columns [P, 2]."""
    grid = torch.tensor([[1, height, width]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, side, "bilinear", align_corners=True, spatial_merge_size=merge
    )
    return tuple(table.to(device) for table in (indices, weights, get_vision_position_ids(grid, merge)))
