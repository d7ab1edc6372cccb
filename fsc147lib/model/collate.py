"""Samples to tensors: a `Batch` is what the model and the losses take.

Positions and places of visual tokens are computed here, once a batch, so that no forward pass waits for them.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, TypedDict, cast, get_type_hints

import numpy as np
import torch

from ..data import GRID, Sample, area_weights
from .pixels import PixelStore, resized_size
from .prompt import IMAGE_TOKEN, Tokens, neutral_tail, tokenize


class Batch(TypedDict, total=False):
    """Tensors of B images: T positions, at most A answer tokens, P patches and V visual tokens of all images.

    The layout names the axes; B, P or V runs over images.  Sequences end with the answer and are padded on the
    right, where the causal mask keeps padding out of sight.
    """

    names: Annotated[list[str], "B"]
    count: Annotated[list[int], "B"]  # true counts
    input_ids: Annotated[torch.Tensor, "B T"]
    attention_mask: Annotated[torch.Tensor, "B T"]  # 1 on tokens, 0 on padding
    mm_token_type_ids: Annotated[torch.Tensor, "B T"]  # 1 on visual tokens
    visual_index: Annotated[torch.Tensor, "V"]  # their places in the flattened input_ids
    pixel_values: Annotated[torch.Tensor, "P 3*16*16"]  # uint8
    pixel_scale: Annotated[torch.Tensor, "2 3"]  # mean and standard deviation of the colours, in 0..1
    image_sizes: Annotated[list[tuple[int, int]], "B"]  # rows and columns of each image's patches
    image_grid_thw: Annotated[torch.Tensor, "B 3"]  # the same after a 1, as transformers wants it
    image_keys: Annotated[list[tuple[str, bool]], "B"]  # file, and whether mirrored
    image_features: Annotated[torch.Tensor, "V 1+D C"]  # in place of pixels, where `features` keeps them
    position_ids: Annotated[torch.Tensor, "3 B T"]  # M-RoPE: time, height, width; 0 on padding
    labels: Annotated[torch.Tensor, "B T"]  # the token at each answer position, -100 elsewhere
    answer_positions: Annotated[torch.Tensor, "B A"]  # one before each token of the answer, 0 where unused
    answer_labels: Annotated[torch.Tensor, "B A"]  # those tokens, -100 where unused
    answer_tokens: int  # their number
    digit_weights: Annotated[torch.Tensor, "B A"]  # 1 / digits where the token is a digit, 0 elsewhere
    row_weights: Annotated[torch.Tensor, "B 14 T"]  # share of a visual token's height in each heatmap row
    column_weights: Annotated[torch.Tensor, "B 14 T"]  # and of its width in each column; 0 on text
    target: Annotated[torch.Tensor, "B 14 14"]  # target heatmaps; zeros without objects
    neutral_tail: Annotated[torch.Tensor, "S"]  # tokens of the neutral question, from the image on


FIELDS = get_type_hints(Batch, include_extras=True).items()
LAYOUTS = {name: field.__metadata__[0].split() for name, field in FIELDS if field is not int}


def image_key(sample: Sample) -> tuple[str, bool]:
    """A batch's name of an image: its file, and whether it is mirrored."""
    return str((sample.mirror_of or sample).image_path), sample.mirror_of is not None


class Collate:
    """Makes a `Batch` of samples, as the `collate_fn` of a DataLoader.

    Args:
        tokenizer, image_processor: of a `CountingModel`.
        store: keeps decoded images for later epochs; None keeps none.
        pixels: False leaves the images out, for batches that get `image_features`.
    """

    def __init__(self, tokenizer, image_processor, store: PixelStore | None = None, pixels: bool = True):
        self.tokenizer, self.image_processor, self.pixels = tokenizer, image_processor, pixels
        self.store = store or PixelStore([], image_processor)
        self._tokens: dict[tuple[str, int], Tokens] = {}
        self.neutral_tail = torch.tensor(neutral_tail(tokenizer))
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def tokens(self, sample: Sample) -> Tokens:
        """Prompt and answer of a sample, made once for each category and count."""
        key = sample.category, sample.count
        if key not in self._tokens:
            self._tokens[key] = tokenize(self.tokenizer, *key)
        return self._tokens[key]

    def visual_tokens(self, sample: Sample) -> int:
        """Visual tokens of a sample's image."""
        rows, columns, _ = self.lengths(sample)
        return rows * columns // self.image_processor.merge_size**2

    def lengths(self, sample: Sample, tokens: Tokens | None = None) -> tuple[int, int, int]:
        """Patch rows and columns of a sample's image, and the length of its sequence."""
        processor, tokens = self.image_processor, tokens or self.tokens(sample)
        rows, columns = (length // processor.patch_size for length in resized_size(sample, processor))
        text = len(tokens.head) + len(tokens.tail) + len(tokens.answer)
        return rows, columns, text + rows * columns // processor.merge_size**2

    def __call__(self, samples: Sequence[Sample], answers: Sequence[list[int]] | None = None) -> Batch:
        """The batch of some samples, with the tokens of `answers` in place of the true ones."""
        tokens = [self.tokens(sample) for sample in samples]
        if answers is not None:
            tokens = [each.with_answer(self.tokenizer, ids) for each, ids in zip(tokens, answers, strict=True)]
        lengths = [self.lengths(*each) for each in zip(samples, tokens, strict=True)]
        sizes = [(height, width) for height, width, _ in lengths]
        rows, length, width = len(samples), max(total for *_, total in lengths), max(len(t.answer) for t in tokens)
        batch = Batch(
            names=[sample.name for sample in samples],
            count=[sample.count for sample in samples],
            input_ids=torch.full((rows, length), self.tokenizer.pad_token_id),
            attention_mask=torch.zeros(rows, length, dtype=torch.long),
            mm_token_type_ids=torch.zeros(rows, length, dtype=torch.int),
            image_sizes=sizes,
            image_grid_thw=torch.tensor([(1, *size) for size in sizes]),
            image_keys=[image_key(sample) for sample in samples],
            position_ids=torch.zeros(3, rows, length, dtype=torch.long),
            labels=torch.full((rows, length), -100),
            answer_positions=torch.zeros(rows, width, dtype=torch.long),
            answer_labels=torch.full((rows, width), -100),
            answer_tokens=sum(len(t.answer) for t in tokens),
            digit_weights=torch.zeros(rows, width),
            row_weights=torch.zeros(rows, GRID, length),
            column_weights=torch.zeros(rows, GRID, length),
            target=torch.from_numpy(np.stack([sample.target for sample in samples])),
            neutral_tail=self.neutral_tail,
        )
        for i, (parts, size) in enumerate(zip(tokens, sizes, strict=True)):
            self._write_row(batch, i, parts, *(side // self.image_processor.merge_size for side in size))
        batch["visual_index"] = batch["mm_token_type_ids"].flatten().nonzero()[:, 0]
        if self.pixels:
            batch["pixel_values"] = torch.cat([self.store.patches(sample) for sample in samples])
            batch["pixel_scale"] = torch.tensor([self.image_processor.image_mean, self.image_processor.image_std])
        return batch

    def _write_row(self, batch: Batch, i: int, parts: Tokens, height: int, width: int) -> None:
        """Fill row i: head, height x width visual tokens, tail and answer."""
        head, visual, n = len(parts.head), height * width, len(parts.answer)
        ids = torch.tensor([*parts.head, *[self.image_token] * visual, *parts.tail, *parts.answer])
        length, on_image = len(ids), slice(head, head + visual)
        batch["input_ids"][i, :length] = ids
        batch["attention_mask"][i, :length] = 1
        batch["mm_token_type_ids"][i, on_image] = 1
        y, x, batch["row_weights"][i, :, on_image], batch["column_weights"][i, :, on_image] = _token_grid(height, width)
        # M-RoPE: text counts on, an image stands at one time and spreads over height and width
        before, image = torch.arange(head), head + torch.stack([torch.zeros_like(y), y, x])
        after = head + max(height, width) + torch.arange(length - head - visual)
        batch["position_ids"][:, i, :length] = torch.cat([before.expand(3, -1), image, after.expand(3, -1)], dim=1)
        batch["labels"][i, length - n : length] = batch["answer_labels"][i, :n] = ids[length - n :]
        batch["answer_positions"][i, :n] = torch.arange(length - n - 1, length - 1)
        batch["digit_weights"][i, :n] = torch.tensor(parts.is_digit) / sum(parts.is_digit)


@lru_cache(maxsize=512)
def _token_grid(height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Row and column of each token [h * w], and how much of it lies in each row and column of a heatmap [14, h * w]."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    rows, columns = (torch.from_numpy(area_weights(length, GRID)).float() for length in (height, width))
    return y, x, rows[:, y], columns[:, x]


def need_right_padding(batch: Batch) -> None:
    """Raise ValueError where a batch on the CPU is padded on the left, which no mask hides; a GPU is not waited for."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.device.type == "cpu" and 0 in mask[:, 0].tolist():
        raise ValueError("a row of the batch is padded on the left: pad on the right, as Collate does")


def to_device(batch: Batch, device) -> Batch:
    """The batch with its tensors on a device; ValueError where it is padded on the left."""
    need_right_padding(batch)
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)


def select_rows(batch: Batch, rows: list[int]) -> Batch:
    """Some images of a batch as a batch, with the same padding and without `answer_tokens`."""
    length, index = batch["input_ids"].shape[1], batch["visual_index"]
    patches = [0, *accumulate(height * width for height, width in batch["image_sizes"])]
    tokens = [first * len(index) // patches[-1] for first in patches]
    starts = {"B": range(len(patches)), "P": patches, "V": tokens}  # where each image begins

    selected: dict[str, Any] = {**batch}
    for name, value in selected.items():
        axis = next((i for i, size in enumerate(LAYOUTS.get(name, [])) if size in starts), None)
        if isinstance(value, list):
            selected[name] = [value[row] for row in rows]
        elif axis is not None:
            start = starts[LAYOUTS[name][axis]]
            parts = [value.narrow(axis, start[row], start[row + 1] - start[row]) for row in rows]
            selected[name] = torch.cat(parts, dim=axis)
    selected.pop("answer_tokens", None)
    shifts = torch.tensor([(new - row) * length for new, row in enumerate(rows)])
    shifts = shifts.repeat_interleave(torch.tensor([tokens[row + 1] - tokens[row] for row in rows]))
    selected["visual_index"] = selected["visual_index"] + shifts.to(index.device)
    return cast(Batch, selected)
