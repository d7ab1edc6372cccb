"""Photographs as the vision encoder takes them: resized once, kept as bytes, cut into patches.

Bytes are what transformers' PIL processor has before scaling; `forward.normalised_pixels` scales them on the device.
"""

import shutil
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from ..data.faults import DataError
from ..data.samples import Sample
from .device import free_memory

SHARED_MEMORY = Path("/dev/shm")  # memory that processes share; a container may have little of it


def resized_size(sample: Sample, image_processor) -> tuple[int, int]:
    """(height, width) in pixels after resizing, multiples of 32; a DataError where an image is too narrow for it."""
    factor, limits = image_processor.patch_size * image_processor.merge_size, image_processor.size
    try:
        return smart_resize(*sample.size, factor, limits["shortest_edge"], limits["longest_edge"])
    except ValueError as error:
        raise DataError(f"the image processor refuses {sample.image_path}: {error}") from error


def resized_patches(sample: Sample, image_processor) -> torch.Tensor:
    """The decoded and resized image in patches."""
    height, width = resized_size(sample, image_processor)
    image = sample.image.resize((width, height), Image.Resampling(image_processor.resample))
    return to_patches(torch.from_numpy(np.array(image)), image_processor.patch_size, image_processor.merge_size)


def to_patches(image: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """[H, W, 3] uint8 -> [P, 3 * patch * patch], the merge x merge patches of a token together."""
    blocks = image.unflatten(1, (-1, merge, patch)).unflatten(0, (-1, merge, patch))
    return blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch * patch)


def from_patches(patches: torch.Tensor, columns: int, patch: int, merge: int) -> torch.Tensor:
    """The image [H, W, 3] that `to_patches` cut, from its number of patch columns."""
    blocks = patches.view(-1, columns // merge, merge, merge, 3, patch, patch)
    return blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(-1, columns * patch, 3)


class PixelStore:
    """Patches of resized images, kept as bytes from their first use.

    Args:
        samples: all images that will be used, without mirror images.
        image_processor: of a `CountingModel`.
        shared: worker processes share decoded images.

    Nothing is kept unless twice the room is free.
    """

    def __init__(self, samples: list[Sample], image_processor, shared: bool = False):
        self.image_processor = image_processor
        kept = [sample for sample in samples if sample.in_memory is None]  # names in memory may repeat
        sizes = {sample.image_path: resized_size(sample, image_processor) for sample in kept}
        starts = [0, *accumulate(3 * height * width for height, width in sizes.values())]
        free = free_memory()
        if shared and SHARED_MEMORY.is_dir():
            free = min(free, shutil.disk_usage(SHARED_MEMORY).free)
        self.places: dict[Path, tuple[int, int, int]] = {}  # number, first byte, end
        if 2 * starts[-1] <= free:
            self.places = {path: (i, starts[i], starts[i + 1]) for i, path in enumerate(sizes)}
        self.bytes = torch.empty(starts[-1] if self.places else 0, dtype=torch.uint8)
        self.filled = torch.zeros(len(self.places), dtype=torch.bool)
        if shared:
            self.bytes.share_memory_()
            self.filled.share_memory_()

    def holds(self, samples: list[Sample]) -> bool:
        """Whether the patches of all samples are kept, so that nothing is decoded."""
        files = [sample.mirror_of or sample for sample in samples]
        places = [None if sample.in_memory else self.places.get(sample.image_path) for sample in files]
        return all(place and self.filled[place[0]] for place in places)

    def patches(self, sample: Sample) -> torch.Tensor:
        """[P, 3 * patch * patch] uint8; mirror images are resized first, a grey level off the other order at most."""
        patch, merge = self.image_processor.patch_size, self.image_processor.merge_size
        if sample.mirror_of is not None:
            kept = self.patches(sample.mirror_of)
            tokens = resized_size(sample, self.image_processor)[1] // (patch * merge)  # in a row
            return kept.view(-1, tokens, merge, merge, 3, patch, patch).flip(1, 3, 6).view_as(kept)
        if sample.in_memory is not None or sample.image_path not in self.places:
            return resized_patches(sample, self.image_processor)
        number, start, end = self.places[sample.image_path]
        kept = self.bytes[start:end].view(-1, 3 * patch * patch)
        if not self.filled[number]:
            kept.copy_(resized_patches(sample, self.image_processor))
            self.filled[number] = True  # last, for another worker may look
        return kept
