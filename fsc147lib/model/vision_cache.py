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

import numpy as np
import PIL
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data import Sample
from ..data import samples as images
from ..files import DamagedFolder, file_lock, new_folder, read_manifest, write_manifest
from ..options import ConfigError
from . import attention, forward, pixels
from .collate import Batch, Collate, image_key, to_device
from .device import Compute, free_memory, gpu_memory, leave_signals_to_parent, memory_in_use, signals_later
from .forward import encode_images
from .network import CountingModel

GPU_SHARE, HOST_SHARE = 0.25, 0.5
"""The cache may take so much of the GPU's whole memory, or of the machine's free memory."""

GPU_SPARE = 0.05
"""So much of the GPU's memory stays empty beside it: what is measured once is a little more another time."""

FILE = "features.npy"


class VisionCache:
    """Image features of a set of images, encoded when this is made, or read from a file of an earlier run.

    On disk they lie in a folder named by `cache_key`, so that another encoder or another image never finds it, beside a
    checksum that is compared before they are used.  Of several runs at once one encodes and the others wait.

    Raises:
        ConfigError: the disk has no room for the file.
    """

    def __init__(
        self,
        model: CountingModel,  # whose vision encoder must not change while the cache is in use
        samples: Iterable[Sample],  # all whose features will be asked for; mirror images are samples of their own
        compute: Compute,
        place: str = "auto",  # "gpu", "host" (memory, pinned if there is a GPU), "disk", or the first with room
        folder: Path = Path("runs/vision-cache"),
        workers: int = 0,  # processes that read images
        batch_size: int = 32,
        beside: int = 0,  # bytes that all else will take of the GPU, beside what is in use now
    ):
        self.device, network = compute.device, model.network.to(compute.device)
        samples, collate = list(samples), Collate(model.tokenizer, model.image_processor)
        sizes = {image_key(sample): collate.lengths(sample)[:2] for sample in samples}
        self.places, total = {}, 0  # image key -> its tokens
        for key, (rows, columns) in sizes.items():
            self.places[key] = slice(total, total + rows * columns // 4)
            total += rows * columns // 4
        vision = network.config.vision_config
        self.dtype = network.model.visual.dtype if compute.precision == "fp32" else compute.dtype
        self.shape = (total, 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size)
        self.place = choose_place(math.prod(self.shape) * self.dtype.itemsize, beside) if place == "auto" else place
        by_size = sorted(samples, key=lambda sample: sizes[image_key(sample)])
        loader = DataLoader(
            by_size, batch_size, collate_fn=collate, num_workers=workers, worker_init_fn=leave_signals_to_parent
        )
        if self.place != "disk":
            on_gpu = self.device.type == "cuda"
            where = {"device": self.device} if self.place == "gpu" else {"pin_memory": on_gpu}
            self.features = torch.empty(self.shape, dtype=self.dtype, **where)
            self._fill(network, compute, loader)
            return
        kept = Path(folder) / cache_key(model, samples, self.dtype)
        with file_lock(kept.with_suffix(".lock"), wait=True):
            if not _is_whole(kept):
                with new_folder(kept, replace=True) as draft:
                    mapped = _new_file(draft / FILE, self.shape, self.dtype)
                    self.features = torch.from_numpy(mapped).view(self.dtype)
                    self._fill(network, compute, loader)
                    mapped.flush()
                    write_manifest(draft, encoder=json.loads(vision.to_json_string()), code=code_version())
            self.features = torch.from_numpy(np.load(kept / FILE, mmap_mode="c")).view(self.dtype)

    @torch.no_grad()
    def _fill(self, network, compute: Compute, loader: DataLoader) -> None:
        with signals_later():  # its processes begin
            batches = iter(loader)
        for batch in tqdm(batches, desc="encode images", total=len(loader), leave=False):
            with compute.autocast():
                encoded = encode_images(network, to_device(batch, self.device))
            places = [self.places[key] for key in batch["image_keys"]]
            each = torch.stack(encoded, dim=1).split([place.stop - place.start for place in places])
            for place, features in zip(places, each, strict=True):  # [tokens, 1 + D, C]
                self.features[place].copy_(features)

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `image_features` [V, 1 + D, C] of its images, on the device."""
        kept = [self.features[self.places[key]].to(self.device, non_blocking=True) for key in batch["image_keys"]]
        return {**batch, "image_features": torch.cat(kept)}

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with their image features; from the host, the next one's are copied while the GPU uses one's."""
        if self.device.type != "cuda" or self.features.device == self.device:
            yield from map(self.add_to, batches)
            return
        stream, ready = torch.cuda.Stream(self.device), None
        for batch in chain(batches, [None]):
            with torch.cuda.stream(stream):
                following = (self.add_to(batch), stream.record_event()) if batch else None
            if ready:
                batch, copied = ready
                torch.cuda.current_stream().wait_event(copied)
                batch["image_features"].record_stream(torch.cuda.current_stream())  # its memory is the other stream's
                yield batch
            ready = following


def choose_place(size: int, beside: int) -> str:
    """Where a cache of so many bytes is kept: "gpu", "host" or "disk", the first with room.

    `beside`: bytes of the GPU that a step takes beside it, and beside what is in use now.
    """
    if torch.cuda.is_available():
        whole, ours = gpu_memory()
        if size <= min(GPU_SHARE * whole, ours - memory_in_use("cuda") - beside - GPU_SPARE * whole):
            return "gpu"
    return "host" if size <= HOST_SHARE * free_memory() else "disk"


def cache_key(model: CountingModel, samples: list[Sample], dtype: torch.dtype) -> str:
    """SHA-256 of all that image features depend on: encoder, preprocessing, precision, code, images and order."""
    visual = model.network.model.visual
    about = [str(dtype), model.image_processor.to_dict(), visual.config.to_json_string(), code_version()]
    key = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, weight in sorted(visual.state_dict().items()):
        key.update(name.encode())
        key.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    contents: dict[str, bytes] = {}
    for path, mirrored in map(image_key, samples):
        if path not in contents:
            contents[path] = hashlib.sha256(Path(path).read_bytes()).digest()
        key.update(contents[path] + bytes([mirrored]))
    return key.hexdigest()[:32]


def code_version() -> str:
    """Of all code between an image's file and its features: a hash of this library's modules, others' versions."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (images, pixels, forward, attention))
    others = [f"{library.__name__} {library.__version__}" for library in (torch, transformers, PIL)]
    return ", ".join([hashlib.sha256(sources).hexdigest()[:16], *others])


def _is_whole(folder: Path) -> bool:
    """Whether features are there that are, byte by byte, those that were written."""
    try:
        return read_manifest(folder, whole=True) is not None
    except DamagedFolder:
        return False


def _new_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    """A map of a new file whose room on disk is taken: without it, it would die of SIGBUS when the disk is full."""
    path.parent.mkdir()
    try:
        mapped = np.lib.format.open_memmap(path, "w+", f"i{dtype.itemsize}", shape)  # numpy has no bfloat16
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return mapped
    except OSError as error:
        shutil.rmtree(path.parent)
        size, folder = math.prod(shape) * dtype.itemsize, path.parent.parent
        free = shutil.disk_usage(folder).free
        raise ConfigError(
            f"the vision cache needs {size / 2**20:.0f} MiB in {folder}, where {free / 2**20:.0f} MiB are free "
            f"({error.strerror}): make room, or train with --vision-cache host or off"
        ) from error
