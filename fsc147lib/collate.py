"""Samples to tensors: a `Batch` is what the model and the losses take.

`Collate` works with the tokenizer and the image processor that it is given, and does once per batch what
a forward pass would otherwise do per image: positions, and each visual token's place on the 14x14 grid.

Left out: the model itself.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .data import Sample
from .faults import DataError
from .prompt import IMAGE_TOKEN, tokenize
from .targets import GRID, area_weights


class Batch(TypedDict, total=False):
    """A plain dict of tensors; B images, T positions, A answer tokens at the most, P patches in all.

    Training batches end with the answer and are padded on the right; there the causal mask alone keeps
    padding out of sight.  Prompts (`Collate.assemble(answers=False)`) are padded on the left, as `generate`
    wants them, and end with `image_grid_thw`.
    """

    names: list[str]
    count: torch.Tensor  # [B] the true counts
    input_ids: torch.Tensor  # [B, T]
    attention_mask: torch.Tensor  # [B, T] 1 on tokens, 0 on padding
    mm_token_type_ids: torch.Tensor  # [B, T] 1 on visual tokens
    pixel_values: torch.Tensor  # [P, 3 * 2 * 16 * 16] normalised patches of all images, one after the other
    image_grid_thw: torch.Tensor  # [B, 3] 1, rows and columns of each image's patches
    position_ids: torch.Tensor  # [3, B, T] M-RoPE: time, height, width; 0 on padding
    labels: torch.Tensor  # [B, T] the token at each answer position, -100 elsewhere
    answer_positions: torch.Tensor  # [B, A] positions whose next token belongs to the answer (0 where unused)
    answer_labels: torch.Tensor  # [B, A] those next tokens, -100 where unused
    digit_weights: torch.Tensor  # [B, A] 1 / digits where the next token is a digit, else 0
    row_weights: torch.Tensor  # [B, 14, T] how much of a visual token's height lies in each heatmap row
    column_weights: torch.Tensor  # [B, 14, T] and of its width in each column; 0 on all other tokens
    target: torch.Tensor  # [B, 14, 14] target heatmaps


class Collate:
    """Makes a `Batch` of samples: `DataLoader(samples, collate_fn=Collate(tokenizer, image_processor))`.

    Args:
        tokenizer, image_processor: of a `CountingModel`.
        keep: hold each image in memory as resized bytes once it is read (0.3 MB for the tiny model,
            0.7 MB for the real one), so that later epochs do not decode it again.
    """

    def __init__(self, tokenizer, image_processor, keep: bool = False):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._kept = {} if keep else None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self.assemble(samples, self.pixels(samples))

    def pixels(self, samples: Sequence[Sample]) -> Batch:
        """The image processor's part: `pixel_values` and `image_grid_thw`."""
        try:
            return self.image_processor(images=[self._image(sample) for sample in samples], return_tensors="pt")
        except DataError:
            raise
        except ValueError as error:  # for example an image 200 times as wide as high
            names = ", ".join(sample.name for sample in samples)
            raise DataError(f"the image processor refuses one of {names}: {error}") from error

    def assemble(self, samples: Sequence[Sample], pixels: Batch, answers: bool = True) -> Batch:
        """All the rest: with the right answers, to train on; or prompts alone, to be answered."""
        grids = pixels["image_grid_thw"] // self.image_processor.merge_size  # of tokens: only h and w count
        tokens = [tokenize(self.tokenizer, sample.category, sample.count) for sample in samples]
        lengths = [
            len(t.head) + int(h * w) + len(t.tail) + answers * len(t.answer)
            for t, (_, h, w) in zip(tokens, grids, strict=True)
        ]
        rows, length = len(samples), max(lengths)
        width = max(len(t.answer) for t in tokens)
        batch = Batch(
            names=[sample.name for sample in samples],
            count=torch.tensor([sample.count for sample in samples]),
            input_ids=torch.full((rows, length), self.tokenizer.pad_token_id),
            attention_mask=torch.zeros(rows, length, dtype=torch.long),
            mm_token_type_ids=torch.zeros(rows, length, dtype=torch.int),
            **pixels,
        )
        if answers:
            batch |= Batch(
                position_ids=torch.zeros(3, rows, length, dtype=torch.long),
                labels=torch.full((rows, length), -100),
                answer_positions=torch.zeros(rows, width, dtype=torch.long),
                answer_labels=torch.full((rows, width), -100),
                digit_weights=torch.zeros(rows, width),
                row_weights=torch.zeros(rows, GRID, length),
                column_weights=torch.zeros(rows, GRID, length),
                target=torch.from_numpy(np.stack([sample.target for sample in samples])),
            )
        for i, (parts, (_, height, breadth)) in enumerate(zip(tokens, grids.tolist(), strict=True)):
            self._write_row(batch, i, parts, height, breadth, lengths[i], answers)
        return batch

    def _write_row(self, batch: Batch, i: int, parts, height: int, width: int, length: int, answers: bool):
        """Fill row i: head, height x width visual tokens, tail, and the answer if it is wanted."""
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        head, visual = len(parts.head), height * width
        ids = [*parts.head, *[image] * visual, *parts.tail, *(parts.answer if answers else [])]
        place = slice(0, length) if answers else slice(-length, None)
        batch["input_ids"][i, place] = torch.tensor(ids)
        batch["attention_mask"][i, place] = 1
        batch["mm_token_type_ids"][i, place] = (torch.tensor(ids) == image).int()
        if not answers:
            return
        on_image = slice(head, head + visual)
        y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        batch["position_ids"][:, i, :length] = _mrope(head, y, x, length - head - visual)
        start, n = length - len(parts.answer), len(parts.answer)
        batch["labels"][i, start:length] = torch.tensor(parts.answer)
        batch["answer_positions"][i, :n] = torch.arange(start - 1, length - 1)
        batch["answer_labels"][i, :n] = torch.tensor(parts.answer)
        batch["digit_weights"][i, :n] = torch.tensor(parts.is_digit) / sum(parts.is_digit)
        batch["row_weights"][i, :, on_image] = torch.from_numpy(area_weights(height, GRID))[:, y]
        batch["column_weights"][i, :, on_image] = torch.from_numpy(area_weights(width, GRID))[:, x]

    def _image(self, sample: Sample) -> Image.Image:
        """The image, already at the size that the processor would give it if images are kept."""
        if self._kept is None:
            return sample.image
        original = sample.mirror_of or sample
        if original.image_path not in self._kept:
            image, processor = original.image, self.image_processor
            factor = processor.patch_size * processor.merge_size
            height, width = smart_resize(
                image.height, image.width, factor, processor.size["shortest_edge"], processor.size["longest_edge"]
            )
            self._kept[original.image_path] = image.resize((width, height), Image.Resampling(processor.resample))
        image = self._kept[original.image_path]
        return image if original is sample else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _mrope(head: int, y: torch.Tensor, x: torch.Tensor, tail: int) -> torch.Tensor:
    """Qwen3-VL's positions [3, T]: text counts on, an image stands at one time and spreads over height and width."""
    image = torch.stack([torch.zeros_like(y), y, x]) + head
    after = head + max(int(y[-1]), int(x[-1])) + 1
    return torch.cat([torch.arange(head).expand(3, -1), image, torch.arange(after, after + tail).expand(3, -1)], dim=1)


def to_device(batch: Batch, device) -> Batch:
    """The batch with its tensors on a device; names stay as they are."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
