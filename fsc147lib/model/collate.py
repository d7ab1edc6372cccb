"""Samples to tensors: a `Batch` is what the model and the losses take.

Images are resized, cut into patches and kept as the bytes that transformers' PIL processor has before it scales them.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ..data import GRID, DataError, Sample, area_weights
from .device import free_memory
from .prompt import IMAGE_TOKEN, Tokens, neutral_tail, tokenize


class Batch(TypedDict, total=False):
    """Tensors of B images with T positions, at most A answer tokens, and P patches and V visual tokens in all.

    A sequence is question, answer and padding on the right, which the causal mask hides.
    """

    names: list[str]
    count: list[int]  # true counts
    input_ids: torch.Tensor  # [B, T]
    attention_mask: torch.Tensor  # [B, T] 1 on tokens, 0 on padding
    mm_token_type_ids: torch.Tensor  # [B, T] 1 on visual tokens, 0 elsewhere
    pixel_values: torch.Tensor  # [P, 3 * 16 * 16] uint8, image by image, or float as transformers takes it
    pixel_scale: torch.Tensor  # [2, 3] mean and standard deviation of the colours, in 0..1
    image_sizes: list[tuple[int, int]]  # rows and columns of each image's patches
    image_grid_thw: torch.Tensor  # [B, 3] the same after a 1, as transformers takes it
    image_keys: list[tuple[str, bool]]  # file, and whether mirrored
    image_features: torch.Tensor  # [V, 1 + D, C] kept outputs of the encoder, in place of pixels
    position_ids: torch.Tensor  # [3, B, T] M-RoPE: time, height, width; 0 on padding
    labels: torch.Tensor  # [B, T] the token at each position of the answer, -100 elsewhere
    answer_positions: torch.Tensor  # [B, A] one before each token of the answer, 0 where unused
    answer_labels: torch.Tensor  # [B, A] those tokens, -100 where unused
    answer_tokens: int  # their number in the batch
    digit_weights: torch.Tensor  # [B, A] 1 / number of digits where the token is a digit, 0 elsewhere
    row_weights: torch.Tensor  # [B, 14, T] share of a visual token's height in each heatmap row, 0 on text
    column_weights: torch.Tensor  # [B, 14, T] share of its width in each heatmap column, 0 on text
    target: torch.Tensor  # [B, 14, 14] target heatmaps; zeros without objects
    neutral_tail: torch.Tensor  # [S] tokens of the neutral question, from the image on


def resized_size(sample: Sample, image_processor) -> tuple[int, int]:
    """(height, width) in pixels after resizing, multiples of 32; DataError for an image that is too narrow."""
    factor, limits = image_processor.patch_size * image_processor.merge_size, image_processor.size
    try:
        return smart_resize(*sample.size, factor, limits["shortest_edge"], limits["longest_edge"])
    except ValueError as error:
        raise DataError(f"the image processor refuses {sample.image_path}: {error}") from error


def to_patches(image: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """Cut an image [H, W, 3] into patches [P, 3 * patch * patch]; the merge x merge ones of a token stand together."""
    blocks = image.unflatten(1, (-1, merge, patch)).unflatten(0, (-1, merge, patch))
    return blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch * patch)


def from_patches(patches: torch.Tensor, columns: int, patch: int, merge: int) -> torch.Tensor:
    """The image [H, W, 3] that `to_patches` cut, with `columns` patches in a row."""
    blocks = patches.view(-1, columns // merge, merge, merge, 3, patch, patch)
    return blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(-1, columns * patch, 3)


class PixelStore:
    """Keeps patches of image files from their first use, up to `room` bytes; None: half of the free memory."""

    def __init__(self, image_processor, room: int | None = None):
        self.image_processor = image_processor
        self.room = free_memory() // 2 if room is None else room
        self.kept: dict[Path, torch.Tensor] = {}

    def patches(self, sample: Sample) -> torch.Tensor:
        """[P, 3 * patch * patch] uint8 of a sample's image; a mirror image is mirrored after resizing."""
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        height, width = resized_size(sample, self.image_processor)
        if sample.mirror_of is not None:
            kept = self.patches(sample.mirror_of)
            tokens = width // (patch * merge)  # in a row
            return kept.view(-1, tokens, merge, merge, 3, patch, patch).flip(1, 3, 6).view_as(kept)
        has_file = sample.in_memory is None  # names of images in memory may repeat
        if has_file and sample.image_path in self.kept:
            return self.kept[sample.image_path]
        image = sample.image.resize((width, height), Image.Resampling(self.image_processor.resample))
        patches = to_patches(torch.from_numpy(np.array(image)), patch, merge)
        if has_file and patches.nbytes <= self.room:
            self.room -= patches.nbytes
            self.kept[sample.image_path] = patches
        return patches


def image_key(sample: Sample) -> tuple[str, bool]:
    """A sample's entry in `image_keys`: the path of its file, and whether it is mirrored."""
    return str((sample.mirror_of or sample).image_path), sample.mirror_of is not None


class Collate:
    """Makes a `Batch` of samples; the `collate_fn` of a DataLoader.

    `store` keeps decoded images; None decodes an image at each use.  Without `pixels` a batch has no images.
    """

    def __init__(self, tokenizer, image_processor, store: PixelStore | None = None, pixels: bool = True):
        self.tokenizer, self.image_processor, self.pixels = tokenizer, image_processor, pixels
        self.store = store or PixelStore(image_processor, room=0)
        self._tokens: dict[tuple[str, int], Tokens] = {}
        self.neutral_tail = torch.tensor(neutral_tail(tokenizer))
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def tokens(self, sample: Sample) -> Tokens:
        """Tokens of a sample's question and true answer, made once for each category and count."""
        key = sample.category, sample.count
        if key not in self._tokens:
            self._tokens[key] = tokenize(self.tokenizer, *key)
        return self._tokens[key]

    def visual_tokens(self, sample: Sample) -> int:
        """Number of visual tokens of a sample's image."""
        height, width = resized_size(sample, self.image_processor)
        return height * width // (self.image_processor.patch_size * self.image_processor.merge_size) ** 2

    def lengths(self, sample: Sample) -> tuple[int, int, int]:
        """Rows and columns of a sample's patches, and the number of tokens of its sequence, true answer included."""
        rows, columns = (side // self.image_processor.patch_size for side in resized_size(sample, self.image_processor))
        tokens = self.tokens(sample)
        text = len(tokens.head) + len(tokens.tail) + len(tokens.answer)
        return rows, columns, text + self.visual_tokens(sample)

    def __call__(self, samples: Sequence[Sample], answers: Sequence[list[int]] | None = None) -> Batch:
        """The samples' batch; `answers`, token ids for each sample, replace the true answers."""
        tokens, sizes = [self.tokens(sample) for sample in samples], [self.lengths(sample)[:2] for sample in samples]
        if answers is not None:
            tokens = [each.with_answer(self.tokenizer, ids) for each, ids in zip(tokens, answers, strict=True)]
        rows = [self._row(*each) for each in zip(tokens, sizes, strict=True)]
        fills = {"input_ids": self.tokenizer.pad_token_id, "labels": -100, "answer_labels": -100}
        padded: dict[str, Any] = {key: _padded([row[key] for row in rows], fills.get(key, 0)) for key in rows[0]}
        padded["position_ids"] = padded["position_ids"].transpose(0, 1).contiguous()  # [3, B, T]
        batch = cast(Batch, padded) | Batch(
            names=[sample.name for sample in samples],
            count=[sample.count for sample in samples],
            image_sizes=sizes,
            image_grid_thw=torch.tensor([(1, *size) for size in sizes]),
            image_keys=[image_key(sample) for sample in samples],
            answer_tokens=sum(len(each.answer) for each in tokens),
            target=torch.from_numpy(np.stack([sample.target for sample in samples])),
            neutral_tail=self.neutral_tail,
        )
        if self.pixels:
            batch["pixel_values"] = torch.cat([self.store.patches(sample) for sample in samples])
            batch["pixel_scale"] = torch.tensor([self.image_processor.image_mean, self.image_processor.image_std])
        return batch

    def _row(self, parts: Tokens, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """A sample's tensors [..., T] or [..., A] without padding; `size` is that of its patches."""
        height, width = (side // self.image_processor.merge_size for side in size)
        head, visual, n = len(parts.head), height * width, len(parts.answer)
        ids = torch.tensor([*parts.head, *[self.image_token] * visual, *parts.tail, *parts.answer])
        behind = len(ids) - head - visual
        y, x, rows, columns = _token_grid(height, width)
        # M-RoPE: text counts on, an image stands at one time and spreads over height and width
        before, image = torch.arange(head), head + torch.stack([torch.zeros_like(y), y, x])
        after = head + max(height, width) + torch.arange(behind)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": F.pad(torch.ones(visual, dtype=torch.int), (head, behind)),
            "position_ids": torch.cat([before.expand(3, -1), image, after.expand(3, -1)], dim=1),
            "labels": F.pad(ids[len(ids) - n :], (len(ids) - n, 0), value=-100),
            "answer_positions": torch.arange(len(ids) - n - 1, len(ids) - 1),
            "answer_labels": ids[len(ids) - n :],
            "digit_weights": torch.tensor(parts.is_digit) / sum(parts.is_digit),
            "row_weights": F.pad(rows, (head, behind)),
            "column_weights": F.pad(columns, (head, behind)),
        }


def _padded(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
    """Stack tensors, with `fill` behind the last dimension of shorter ones."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([F.pad(row, (0, longest - row.shape[-1]), value=fill) for row in rows])


@lru_cache(maxsize=512)
def _token_grid(height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Row and column of each token [h * w], and its share in each row and in each column of a heatmap [14, h * w]."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    rows, columns = (torch.from_numpy(area_weights(length, GRID)).float() for length in (height, width))
    return y, x, rows[:, y], columns[:, x]


def need_right_padding(batch: Batch) -> None:
    """Raise ValueError for a batch with padding on the left, which no mask hides; batches on a GPU are not checked."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.device.type == "cpu" and 0 in mask[:, 0].tolist():
        raise ValueError("a row of the batch is padded on the left: pad on the right, as Collate does")


def to_device(batch: Batch, device) -> Batch:
    """The batch with its tensors on a device; ValueError if it has padding on the left."""
    need_right_padding(batch)
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)


def select_rows(batch: Batch, rows: list[int]) -> Batch:
    """The batch of the images at some places of a batch, with the same T and without `answer_tokens`."""
    patches = [height * width for height, width in batch["image_sizes"]]
    selected: dict[str, Any] = {key: value for key, value in batch.items() if key != "answer_tokens"}
    for key, value in selected.items():
        if isinstance(value, list):
            selected[key] = [value[row] for row in rows]
        elif key not in ("pixel_scale", "neutral_tail"):  # these are the same for all images
            of_image: Any = 1  # an index tensor in place of parts would make the host wait for the GPU
            if key in ("pixel_values", "image_features"):
                of_image = [number * len(value) // sum(patches) for number in patches]
            axis = 1 if key == "position_ids" else 0
            parts = value.split(of_image, dim=axis)
            selected[key] = torch.cat([parts[row] for row in rows], dim=axis)
    return cast(Batch, selected)
