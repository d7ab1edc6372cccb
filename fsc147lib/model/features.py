"""Kept image features: a frozen vision encoder runs once for each image."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import PIL
import torch
import transformers
from torch.utils.data import DataLoader

from ..data import Sample
from ..data import samples as images
from ..files import DamagedFolder, file_lock, new_folder, read_manifest, write_manifest
from ..options import ConfigError
from ..readers import progress_bar, read, reader_options
from . import attention, forward, pixels
from .collate import Batch, Collate, image_key, to_device
from .device import Compute
from .network import CountingModel

FILE = "features.npy"


@dataclass
class KeptFeatures:
    """Outputs of the vision encoder for a set of images; `encode` makes them."""

    features: torch.Tensor  # [tokens, 1 + D, C] on the GPU, in the host's memory, or mapped from a file
    places: dict[tuple[str, bool], slice]  # an image's tokens, by `image_key`
    device: torch.device  # of the batches

    @classmethod
    def encode(
        cls, model: CountingModel, samples: Iterable[Sample], compute: Compute, place: str, folder: Path, workers: int
    ) -> "KeptFeatures":
        """Encode images; mirror images are samples of their own.

        Args:
            model: its vision encoder must not change while the features are in use.
            place: "gpu", "host" or "disk".
            folder: of the file on disk, named by `features_key` and compared by checksum.  One of several runs
                encodes, the others wait.
            workers: processes that read images.

        Raises:
            ConfigError: the disk has no room.
        """
        network, collate = model.network.to(compute.device), Collate(model.tokenizer, model.image_processor)
        by_size = {image_key(sample): sample for sample in sorted(samples, key=collate.lengths)}
        places, total = {}, 0
        for key, sample in by_size.items():
            places[key] = slice(total, total + collate.visual_tokens(sample))
            total = places[key].stop
        vision = network.config.vision_config
        dtype = network.model.visual.dtype if compute.precision == "fp32" else compute.dtype
        shape = total, 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size
        loader = DataLoader(list(by_size.values()), 32, collate_fn=collate, **reader_options(workers))
        if place != "disk":
            where = {"device": compute.device} if place == "gpu" else {"pin_memory": compute.device.type == "cuda"}
            kept = cls(torch.empty(shape, dtype=dtype, **where), places, compute.device)
            kept._fill(network, compute, loader)
            return kept
        path = Path(folder) / features_key(model, list(by_size.values()), dtype)
        with file_lock(path.with_suffix(".lock"), wait=True):
            try:
                is_whole = read_manifest(path, whole=True) is not None
            except DamagedFolder:
                is_whole = False
            if not is_whole:
                with new_folder(path, replace=True) as draft:
                    mapped = _new_file(draft / FILE, shape, dtype)
                    cls(torch.from_numpy(mapped).view(dtype), places, compute.device)._fill(network, compute, loader)
                    mapped.flush()
                    write_manifest(draft, code=code_version())
            mapped = np.load(path / FILE, mmap_mode="c")
        return cls(torch.from_numpy(mapped).view(dtype), places, compute.device)

    @torch.no_grad()
    def _fill(self, network, compute: Compute, loader: DataLoader) -> None:
        for batch in progress_bar(read(loader), desc="encode images", total=len(loader), leave=False):
            with compute.autocast():
                encoded = torch.stack(forward.encode_images(network, to_device(batch, self.device)), dim=1)
            places = [self.places[key] for key in batch["image_keys"]]
            each = encoded.split([place.stop - place.start for place in places])
            for place, features in zip(places, each, strict=True):  # [tokens, 1 + D, C]
                self.features[place].copy_(features)

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `image_features` [V, 1 + D, C] of its images, on the device."""
        kept = [self.features[self.places[key]].to(self.device, non_blocking=True) for key in batch["image_keys"]]
        return cast(Batch, {**batch, "image_features": torch.cat(kept)})

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with their features; the host copies them while the GPU works on the previous batch."""
        if self.device.type != "cuda" or self.features.is_cuda:
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


def features_key(model: CountingModel, samples: list[Sample], dtype: torch.dtype) -> str:
    """A hash of encoder, preprocessing, precision, code, images and order."""
    visual = model.network.model.visual
    about = [str(dtype), model.image_processor.to_dict(), visual.config.to_json_string(), code_version()]
    key = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, weight in sorted(visual.state_dict().items()):
        key.update(name.encode())
        key.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    for path, mirrored in map(image_key, samples):
        key.update(hashlib.sha256(Path(path).read_bytes()).digest() + bytes([mirrored]))
    return key.hexdigest()[:32]


def code_version() -> str:
    """A hash of the modules between an image's file and its features, and other libraries' versions."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (images, pixels, forward, attention))
    others = [f"{library.__name__} {library.__version__}" for library in (torch, transformers, PIL)]
    return ", ".join([hashlib.sha256(sources).hexdigest()[:16], *others])


def _new_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> np.memmap:
    """A map of a new file with its room on disk; a process dies of SIGBUS where a disk fills up later."""
    path.parent.mkdir()
    try:
        mapped = np.lib.format.open_memmap(path, "w+", f"i{dtype.itemsize}", shape)  # numpy has no bfloat16
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return mapped
    except OSError as error:
        shutil.rmtree(path.parent)
        size, free = math.prod(shape) * dtype.itemsize / 2**20, shutil.disk_usage(path.parent.parent).free / 2**20
        raise ConfigError(
            f"kept image features need {size:.0f} MiB in {path.parent.parent}, where {free:.0f} MiB are free "
            f"({error.strerror}): make room, or train with --vision-cache host or off"
        ) from error
