"""Kept outputs of the vision encoder, so that a frozen encoder runs once and not each epoch.

Left out: when to use it (`train`).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data import samples as images
from ..data.samples import Sample
from ..files import file_lock
from ..options import ConfigError
from . import forward, layers, pixels
from .collate import Batch, Collate, to_device
from .device import free_memory, gpu_memory, memory_in_use
from .forward import encode_images
from .network import CountingModel

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
        folder: where files are kept; the file's name is `cache_key`, so that another encoder or another image
            never finds it, and a checksum in it is compared before it is used.  Of several runs at once one encodes
            and the others wait for its file.
        workers: processes that read images.
        compiled: compile the encoder's blocks.

    Raises:
        ConfigError: the disk has no room for the file.
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
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}  # as autocast computes them
        self.dtype = narrow.get(accelerator.mixed_precision, network.model.visual.dtype)
        self.shape = (total, 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size)
        states = sum(3 * weight.nbytes for weight in network.parameters() if weight.requires_grad)
        size = math.prod(self.shape) * self.dtype.itemsize
        self.place = choose_place(size, states) if place == "auto" else place
        order = sorted(range(len(samples)), key=lambda i: sizes[i])
        chunks = [[samples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
        loader = DataLoader(chunks, batch_size=None, collate_fn=collate, num_workers=workers)
        if self.place != "disk":
            on_gpu = self.device.type == "cuda"
            where = {"device": self.device} if self.place == "gpu" else {"pin_memory": on_gpu}
            self.features = torch.empty(self.shape, dtype=self.dtype, **where)
            self._fill(network, accelerator, loader, compiled)
            return
        path = Path(folder) / f"{cache_key(model, samples, self.dtype)}.safetensors"
        with file_lock(path.with_suffix(".lock"), wait=True):
            if not _is_whole(path, self.shape):
                draft = path.with_name(path.name + ".writing")
                header = _header(self.shape, self.dtype, model)
                _reserve(draft, header, math.prod(self.shape) * self.dtype.itemsize)
                self.features, mapped = _map_file(draft, len(header), self.shape, self.dtype, "r+")
                self._fill(network, accelerator, loader, compiled)
                mapped.flush()
                _seal(draft, header)
                draft.rename(path)
            self.features, _ = _map_file(path, _data_start(path), self.shape, self.dtype)

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

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with their image features; from the host, the next one's are copied while the GPU uses one's."""
        if self.device.type != "cuda" or self.features.device == self.device:
            yield from map(self.add_to, batches)
            return
        stream, ready = torch.cuda.Stream(self.device), None
        for batch in chain(batches, [None]):
            following = None
            if batch is not None:
                with torch.cuda.stream(stream):
                    following = self.add_to(batch), stream.record_event()
            if ready is not None:
                batch, copied = ready
                torch.cuda.current_stream().wait_event(copied)
                batch["image_features"].record_stream(torch.cuda.current_stream())  # its memory is the other stream's
                yield batch
            ready = following


def image_key(sample: Sample) -> tuple[str, bool]:
    """How a batch names an image: its file, and whether it is mirrored."""
    return str((sample.mirror_of or sample).image_path), sample.mirror_of is not None


def choose_place(size: int, states: int = 0) -> str:
    """Where a cache of so many bytes is kept: "gpu", "host" or "disk", the first with room.

    Args:
        states: bytes that gradients and the optimizer's moments will take, beside which the GPU keeps GPU_SHARE free
            for a step's activations.
    """
    if torch.cuda.is_available():
        whole, ours = gpu_memory()
        if size <= min(GPU_SHARE * whole, ours - memory_in_use("cuda") - states - GPU_SHARE * whole):
            return "gpu"
    return "host" if size <= HOST_SHARE * free_memory() else "disk"


def cache_key(model: CountingModel, samples: list[Sample], dtype: torch.dtype) -> str:
    """SHA-256 of all that image features depend on: encoder, preprocessing, precision, code, images and order."""
    about = [str(dtype), model.image_processor.to_dict(), _encoder(model), code_version()]
    key = hashlib.sha256(json.dumps(about, default=str).encode())
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


def _encoder(model: CountingModel) -> str:
    return json.dumps(model.network.config.vision_config.to_dict(), default=str, sort_keys=True)


def code_version() -> str:
    """Of all code between an image's file and its features: a hash of this library's modules, others' versions."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (images, pixels, forward, layers))
    others = [f"{library.__name__} {library.__version__}" for library in (torch, transformers, PIL)]
    return ", ".join([hashlib.sha256(sources).hexdigest()[:16], *others])


# --- The file: one tensor "features" in safetensors' own format, written through a memory map


UNSEALED = "0" * 64
"""Stands in the header for the data's SHA-256 until all of them are written."""


def _header(shape: tuple[int, ...], dtype: torch.dtype, model: CountingModel) -> bytes:
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    entry = {"dtype": names[dtype], "shape": shape, "data_offsets": [0, math.prod(shape) * dtype.itemsize]}
    about = {"encoder": _encoder(model), "code": code_version(), "sha256": UNSEALED}
    text = json.dumps({"__metadata__": about, "features": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(path: Path, header: bytes, size: int) -> None:
    """Make the file and take its room on disk: a map of a file without it dies of SIGBUS when the disk is full."""
    try:
        with path.open("wb") as file:
            file.write(header)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), len(header), size)
            file.truncate(len(header) + size)
    except OSError as error:
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise ConfigError(
            f"the vision cache needs {size / 2**20:.0f} MiB in {path.parent}, where {free / 2**20:.0f} MiB are free "
            f"({error.strerror}): make room, or train with --vision-cache host or off"
        ) from error


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _sha256(path: Path) -> str:
    """Of the data behind the header."""
    with path.open("rb") as file:
        file.seek(_data_start(path))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path, header: bytes) -> None:
    """Put the data's checksum into the header."""
    with path.open("r+b") as file:
        file.write(header.replace(UNSEALED.encode(), _sha256(path).encode()))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is there of the shape wanted, whose data are those that were written."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_slice("features").get_shape(), (file.metadata() or {}).get("sha256")
        return found == (list(shape), _sha256(path))
    except (OSError, SafetensorError):
        return False


def _map_file(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype, mode: Literal["c", "r+"] = "c"):
    integers = np.dtype(f"i{dtype.itemsize}")  # numpy has no bfloat16
    mapped = np.memmap(path, integers, mode, offset=start, shape=shape)
    return torch.from_numpy(mapped).view(dtype), mapped
