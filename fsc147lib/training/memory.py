"""What a step and a validation of the heaviest images need of memory, by doing them; no weight moves."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import Sample
from ..evaluation.answering import Reading, answering_tokens, evaluate_samples
from ..model.collate import to_device
from ..model.device import free_memory, free_models, gpu_memory, memory_in_use, peak_memory, seconds_of
from ..model.features import KeptFeatures
from .batches import Shown
from .setup import Run

GPU_SHARE, HOST_SHARE = 0.25, 0.5
"""Kept features may take these shares of the GPU's whole memory, and of the machine's free memory."""

GPU_SPARE = 0.05
"""Share of the GPU's memory that stays empty: the same work takes a little more another time."""


@dataclass
class Measured:
    """Bytes above those in use before, and seconds."""

    step: int = 0  # gradients and activations
    answers: int = 0  # a validation's batch
    window: int = 0  # image features of a step's batches
    first: float = 0.0  # seconds of the first pass, which compiles
    seconds: float = 0.0  # of a step's forward and backward passes


def choose_place(size: int, beside: int) -> str:
    """Where kept features of so many bytes lie: "gpu", "host" or "disk", the first with room.

    `beside`: bytes of the GPU that all else takes beside them, and beside what is in use now.
    """
    if torch.cuda.is_available():
        whole, ours = gpu_memory()
        if size <= min(GPU_SHARE * whole, ours - memory_in_use("cuda") - beside - GPU_SPARE * whole):
            return "gpu"
    return "host" if size <= HOST_SHARE * free_memory() else "disk"


def heaviest_parts(run: Run, size: int) -> list[list[Sample]]:
    """A batch of `size` training images in the passes that --batch-tokens cuts it into, each the heaviest one.

    Without --batch-tokens these are the longest images.  Under it, more of slightly shorter images can be heavier.
    """
    lengths, limit = [tokens for *_, tokens in run.batches.lengths], run.config.batch_tokens
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = [[shown.image for shown in part] for part in run.batches.parts([Shown(i, False) for i in order[-size:]])]
    if limit:
        many = [min(size, place + 1, max(1, limit // lengths[i])) for place, i in enumerate(order)]
        last = max(range(len(order)), key=lambda place: (many[place] * lengths[order[place]], place))
        parts = [order[last + 1 - many[last] : last + 1]] * len(parts)
    return [[run.samples["train"][i] for i in part] for part in parts]


def heaviest_answers(run: Run) -> list[Sample]:
    """The longest validation images that are answered at once."""
    lengths = [run.collate.lengths(sample)[2] for sample in run.samples["val"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    many = max(1, answering_tokens(run.pass_tokens, run.heatmap) // lengths[order[-1]])
    return [run.samples["val"][i] for i in order[-many:]]


def bytes_of_token(run: Run) -> int:
    """Bytes of a visual token's kept features."""
    vision = run.model.network.config.vision_config
    width = (1 + len(vision.deepstack_visual_indexes)) * vision.out_hidden_size
    return width * (4 if run.compute.precision == "fp32" else 2)


def features_bytes(run: Run) -> int:
    """Bytes of all kept image features of a run, mirror images among them."""
    train, val = (sum(map(run.collate.visual_tokens, run.samples[split])) for split in ("train", "val"))
    return ((1 + run.config.flip) * train + val) * bytes_of_token(run)


def measure(run: Run, size: int) -> Measured:
    """A step's passes forward and back, and a validation's batch, of the heaviest images; OutOfMemoryError."""
    step, device, found = run.training_step, run.compute.device, Measured()
    parts, answers = heaviest_parts(run, size), heaviest_answers(run)
    tokens = answering_tokens(run.pass_tokens, run.heatmap)
    if run.config.caches_vision and not run.config.vision_trains(run.epoch):
        kept = [*(sample for part in parts for sample in part), *answers]
        step.features = KeptFeatures.encode(run.model, kept, run.compute, "host", Path(), run.workers)
        found.window = sum(run.collate.visual_tokens(sample) for part in parts for sample in part) * bytes_of_token(run)
    # a second pass has the gradient of the first beside it
    passes = min(2, len(parts) * run.batches.per_step)
    window = [to_device(run.collate(parts[0]), device)] * passes
    before = memory_in_use(device.type)

    def train() -> None:
        found.seconds = seconds_of(lambda: step.gradient(window, run.config.attention_weight), device.type) / passes
        step.optimizer.zero_grad()

    def answer() -> None:
        reading = Reading(batch_tokens=tokens, features=step.features)
        evaluate_samples(run.model, answers, run.heatmap, run.compute, reading=reading)

    try:
        run.model.network.train()  # or layers would keep what --gradient-checkpointing lets them forget
        train()
        answer()
        found.first = found.seconds * passes
        found.step = int((peak_memory(train, device.type) or 0) * 2**20) - before
        found.answers = int((peak_memory(answer, device.type) or 0) * 2**20) - before
        found.seconds *= len(parts) * run.batches.per_step
        return found
    finally:
        step.features = None
        step.optimizer.zero_grad()
        free_models()


def place_of_features(run: Run) -> str:
    """Where a run's kept features lie.  Not on the GPU where a step has no room, nor with several processes, which
    would wait for one that ran out of memory."""
    if run.config.vision_cache != "auto":
        return run.config.vision_cache
    size = features_bytes(run)
    if run.compute.device.type != "cuda" or size > GPU_SHARE * gpu_memory()[0] or run.accelerator.num_processes > 1:
        return choose_place(size, gpu_memory()[0] if run.compute.device.type == "cuda" else 0)
    try:
        needs = measure(run, run.config.batch_size)
    except torch.OutOfMemoryError:
        return choose_place(size, gpu_memory()[0])
    trained = sum(p.nbytes for p in run.training_step.parameters if p.requires_grad)
    moments = 0 if run.training_step.optimizer.state else 2 * trained  # a run that goes on has them already
    return choose_place(size, max(needs.step, needs.answers) + moments + needs.window * run.batches.per_step)
