"""Kept outputs of the vision encoder, so that a frozen encoder runs once and not each epoch.

Left out: when to use it (`train`).
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.fsc147 import Sample
from .collate import Batch, Collate, to_device
from .forward import encode_images
from .network import CountingModel
from .pixels import free_memory

GPU_SHARE, HOST_SHARE = 0.25, 0.5
"""The cache may take so much of the GPU's whole memory, or of the machine's free memory."""


class VisionCache:
    """Image features of a set of images, encoded when this is made, or read from a file of an earlier run.

    Args:
        model: its vision encoder must not change while the cache is in use.
        samples: all whose features will be asked for; mirror images are samples of their own.
        accelerator: gives device and precision.
        place: "gpu", "host" (memory, pinned if there is a GPU), "disk" (a memory-mapped safetensors
            file), or "auto": the first of these with room.
        folder: where files are kept; the file's name is a key made of the encoder's weights, the images'
            bytes and the preprocessing, so that another encoder or another image never finds it.
        workers: processes that read images.
        compiled: compile the encoder's blocks.
    """

    def __init__(
        self,
        model: CountingModel,
        samples: Iterable[Sample],
        accelerator: Accelerator,
        place: str = "auto",
        folder: Path = Path("runs/vision-cache"),
        workers: int = 0,
        batch_size: int = 32,
        compiled: bool = False,
    ):
        self.device, network = accelerator.device, model.network.to(accelerator.device)
        samples = list(samples)
        collate = Collate(model.tokenizer, model.image_processor)
        sizes = [collate.lengths(sample)[:2] for sample in samples]
        self.places, total = {}, 0  # key -> first and last token
        for sample, (rows, columns) in zip(samples, sizes, strict=True):
            self.places[image_key(sample)] = total, total + rows * columns // 4
            total += rows * columns // 4
        vision = network.config.vision_config
        narrow = accelerator.mixed_precision == "bf16"
        self.dtype = torch.bfloat16 if narrow else network.model.visual.dtype
        self.shape = (total, 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size)
        self.place = _choose_place(math.prod(self.shape) * self.dtype.itemsize) if place == "auto" else place
        path = None
        if self.place == "disk":
            path = Path(folder) / f"{cache_key(model, samples, self.dtype)}.safetensors"
            if _is_whole(path, self.shape):
                self.features, _ = _map_file(path, self.shape, self.dtype)
                return
        draft = path and path.with_name(path.name + ".writing")
        self.features, mapped = self._allocate(draft)
        order = sorted(range(len(samples)), key=lambda i: sizes[i])
        chunks = [[samples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
        loader = DataLoader(chunks, batch_size=None, collate_fn=collate, num_workers=workers)
        self._fill(network, accelerator, loader, compiled)
        if path:
            mapped.flush()
            draft.rename(path)

    def _allocate(self, draft: Path | None) -> tuple[torch.Tensor, np.memmap | None]:
        if self.place == "gpu":
            return torch.empty(self.shape, dtype=self.dtype, device=self.device), None
        if self.place == "host":
            return torch.empty(self.shape, dtype=self.dtype, pin_memory=self.device.type == "cuda"), None
        draft.parent.mkdir(parents=True, exist_ok=True)
        header = _header(self.shape, self.dtype)
        with draft.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + math.prod(self.shape) * self.dtype.itemsize)
        return _map_file(draft, self.shape, self.dtype, mode="r+")

    @torch.no_grad()
    def _fill(self, network, accelerator: Accelerator, loader: DataLoader, compiled: bool) -> None:
        for batch in tqdm(loader, desc="encode images", leave=False):
            pixels = Batch(
                pixel_values=batch["pixel_values"], pixel_scale=batch["pixel_scale"], image_sizes=batch["image_sizes"]
            )
            with accelerator.autocast():
                encoded = encode_images(network, to_device(pixels, self.device), compiled=compiled)
            features = torch.stack(encoded, dim=1)  # [V, 1 + D, C]
            start = 0
            for key in batch["image_keys"]:
                first, end = self.places[key]
                self.features[first:end].copy_(features[start : start + end - first])
                start += end - first

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `image_features` [V, 1 + D, C] of its images, on the device."""
        places = [self.places[key] for key in batch["image_keys"]]
        if self.features.device == self.device:
            index = torch.cat([torch.arange(first, end) for first, end in places])
            return {**batch, "image_features": self.features[index.to(self.device, non_blocking=True)]}
        features = torch.empty(
            (sum(end - first for first, end in places), *self.shape[1:]), dtype=self.dtype, device=self.device
        )
        start = 0
        for first, end in places:
            features[start : start + end - first].copy_(self.features[first:end], non_blocking=True)
            start += end - first
        return {**batch, "image_features": features}


def image_key(sample: Sample) -> tuple[str, bool]:
    """How a batch names an image: its file, and whether it is mirrored."""
    return str((sample.mirror_of or sample).image_path), sample.mirror_of is not None


def _choose_place(size: int) -> str:
    if torch.cuda.is_available() and size <= GPU_SHARE * torch.cuda.mem_get_info()[1]:
        return "gpu"
    return "host" if size <= HOST_SHARE * free_memory() else "disk"


def cache_key(model: CountingModel, samples: list[Sample], dtype: torch.dtype) -> str:
    """SHA-256 of all that image features depend on: encoder weights, preprocessing, precision, images and order."""
    key = hashlib.sha256(json.dumps([str(dtype), model.image_processor.to_dict()], default=str).encode())
    for name, weight in sorted(model.network.model.visual.state_dict().items()):
        key.update(name.encode())
        key.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    contents: dict[Path, bytes] = {}
    for sample in samples:
        path, mirrored = (sample.mirror_of or sample).image_path, sample.mirror_of is not None
        if path not in contents:
            contents[path] = hashlib.sha256(path.read_bytes()).digest()
        key.update(contents[path] + bytes([mirrored]))
    return key.hexdigest()[:32]


# --- The file: one tensor "features" in safetensors' own format, written through a memory map


def _header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    entry = {"dtype": names[dtype], "shape": shape, "data_offsets": [0, math.prod(shape) * dtype.itemsize]}
    text = json.dumps({"features": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is there that safetensors finds complete, of the shape wanted."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("features").get_shape()) == shape
    except (OSError, SafetensorError):
        return False


def _map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, mode: Literal["c", "r+"] = "c"):
    integers = np.dtype(f"i{dtype.itemsize}")  # numpy has no bfloat16
    mapped = np.memmap(path, integers, mode, offset=len(_header(shape, dtype)), shape=shape)
    return torch.from_numpy(mapped).view(dtype), mapped
