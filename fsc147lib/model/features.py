"""Kept image features: a frozen vision encoder runs once for each image."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import DataLoader

from ..data import Sample
from ..readers import progress_bar, read, reader_options
from . import forward
from .collate import Batch, Collate, image_key, to_device
from .device import TYPES, Compute
from .network import CountingModel


@dataclass
class KeptFeatures:
    """Outputs of the vision encoder for a set of images; `encode` makes them."""

    features: torch.Tensor  # [tokens, 1 + D, C] on the GPU, or in the host's memory
    places: dict[tuple[str, bool], slice]  # an image's tokens, by `image_key`
    device: torch.device  # of the batches

    @classmethod
    @torch.no_grad()
    def encode(
        cls, model: CountingModel, samples: Iterable[Sample], compute: Compute, place: str, workers: int
    ) -> "KeptFeatures":
        """Run a model's vision encoder, which must not change later, on samples, and keep the outputs in memory.

        `place` is the memory, "gpu" or "host".  Mirror images are samples of their own.
        """
        network, collate = model.network.to(compute.device), Collate(model.tokenizer, model.image_processor)
        by_size = {image_key(sample): sample for sample in sorted(samples, key=collate.lengths)}
        places, total = {}, 0
        for key, sample in by_size.items():
            places[key] = slice(total, total + collate.visual_tokens(sample))
            total = places[key].stop
        vision = network.config.vision_config
        dtype = network.model.visual.dtype if compute.precision == "fp32" else TYPES[compute.precision]
        shape = total, 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size
        where = {"device": compute.device} if place == "gpu" else {"pin_memory": compute.device.type == "cuda"}
        kept = cls(torch.empty(shape, dtype=dtype, **where), places, compute.device)
        loader = DataLoader(list(by_size.values()), 32, collate_fn=collate, **reader_options(workers))
        end = 0  # images come in the order of their places
        for batch in progress_bar(read(loader), desc="encode images", total=len(loader), leave=False):
            with compute.autocast():
                encoded = torch.stack(forward.encode_images(network, to_device(batch, compute.device)), dim=1)
            start, end = end, end + len(encoded)
            kept.features[start:end].copy_(encoded)  # [tokens, 1 + D, C]
        return kept

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `image_features` [V, 1 + D, C] of its images, on the device."""
        kept = [self.features[self.places[key]].to(self.device, non_blocking=True) for key in batch["image_keys"]]
        return {**batch, "image_features": torch.cat(kept)}

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches with their features; each batch's are copied while the GPU works on the batch before."""
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
