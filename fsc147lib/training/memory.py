"""Measure the heaviest images of a run: where kept image features have room, and what `train --dry-run` prints."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from ..data import Sample
from ..model.collate import to_device
from ..model.device import free_memory, free_models, gpu_memory
from ..model.features import KeptFeatures
from ..model.load import count_parameters
from ..model.network import freeze_vision
from .batches import Shown
from .setup import Run, TrainConfig

GPU_SHARE, HOST_SHARE = 0.25, 0.5
"""Largest shares of the GPU's memory, and of the free host memory, for kept features."""

GPU_SPARE = 0.05
"""Share of the GPU's memory that stays free, because the need for memory varies."""


def memory_in_use(device: str) -> int:
    """Bytes that tensors take on "cuda"; on a CPU, bytes of this process."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Call `run`; returns the largest memory meanwhile in MiB: of tensors on "cuda", of the process on a CPU.

    Without Linux, None is returned for a CPU, and `run` is not called.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    except OSError:
        return None
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def wait_for(device: str) -> None:
    """Wait until the GPU has finished; on a CPU nothing happens."""
    if device == "cuda":
        torch.cuda.synchronize()


class Plan(NamedTuple):
    """What a run needs."""

    fits: bool
    text: str  # memory and time
    epoch: float = math.nan  # seconds, without its validation


class Measured(NamedTuple):
    """Cost of the heaviest step and the heaviest batch of answers."""

    bytes: int  # of the larger one, beside weights and moments
    first: float  # seconds of the first passes, which compile
    seconds: float  # of a step's forward and backward passes


def heaviest_parts(run: Run, size: int) -> list[list[Sample]]:
    """The heaviest batch of `size` training images, cut into passes by --batch-tokens.

    Without --batch-tokens these are the longest images.  Under it, more of slightly shorter images can be heavier.
    """
    lengths = [tokens for *_, tokens in run.batches.lengths]
    by_length = [Shown(i, False) for i in sorted(range(len(lengths)), key=lengths.__getitem__)]
    parts = run.batches.parts(by_length[-size:])
    if run.config.batch_tokens:
        full = run.batches.cut(by_length, run.config.batch_tokens)
        parts = [max(full, key=lambda part: len(part[-size:]) * lengths[part[-1].image])[-size:]] * len(parts)
    return [[run.samples["train"][shown.image] for shown in part] for part in parts]


def features_bytes(run: Run, samples: list[Sample]) -> int:
    """Bytes of the samples' kept image features."""
    vision = run.model.network.config.vision_config
    width = (1 + len(vision.deepstack_visual_indexes)) * vision.out_hidden_size
    return sum(map(run.collate.visual_tokens, samples)) * width * (4 if run.compute.precision == "fp32" else 2)


def measure(run: Run, size: int) -> Measured:
    """Measure a step with batches of `size`, and a batch of answers, both of the heaviest images.  No weight changes.

    Raises:
        torch.OutOfMemoryError: there is no room for them.
    """
    step, device, parts = run.training_step, run.compute.device, heaviest_parts(run, size)
    by_length = sorted(run.samples["val"], key=lambda sample: run.collate.lengths(sample)[2])
    answers = by_length[-max(1, run.reading().batch_tokens // run.collate.lengths(by_length[-1])[2]) :]
    features, passes = 0, len(parts) * run.batches.per_step
    if run.config.caches_vision and not run.config.vision_trains(run.epoch):
        images = [sample for part in parts for sample in part]
        step.features = KeptFeatures.encode(run.model, [*images, *answers], run.compute, "host", run.workers)
        features = features_bytes(run, images) * run.batches.per_step
    window = [to_device(run.collate(parts[0]), device)] * min(2, passes)  # a second pass adds to the first's gradient
    in_use = memory_in_use(device.type)

    def train() -> None:
        step.gradient(window, run.config.attention_weight)
        step.optimizer.zero_grad()

    def cost(work: Callable) -> tuple[int, float]:
        began = time.perf_counter()
        peak = peak_memory(work, device.type) or 0
        wait_for(device.type)
        return int(peak * 2**20) - in_use, time.perf_counter() - began

    try:
        run.model.network.train()  # in eval mode gradient checkpointing has no effect
        first = cost(train)[1]
        run.evaluate(answers)
        peak, seconds = cost(train)
        answering = cost(lambda: run.evaluate(answers))[0]
        return Measured(max(peak + features, answering), first, seconds / len(window) * passes)
    finally:
        step.features = None
        step.optimizer.zero_grad()
        free_models()


def choose_place(size: int, beside: float) -> str:
    """The first of "gpu" and "host" with room for `size` bytes of kept features, or "off".

    `beside`: bytes of the GPU that a run needs for other things, above those in use.
    """
    if torch.cuda.is_available():
        whole, ours = gpu_memory()
        if size <= min(GPU_SHARE * whole, ours - memory_in_use("cuda") - beside - GPU_SPARE * whole):
            return "gpu"
    return "host" if size <= HOST_SHARE * free_memory() else "off"


def place_of_features(run: Run) -> str:
    """The place of a run's kept features: "gpu" only if a step fits beside them, and only in a run of one process."""
    if run.config.vision_cache != "auto":
        return run.config.vision_cache
    size, beside, step = features_bytes(run, run.kept_samples()), math.inf, run.training_step
    on_gpu = run.compute.device.type == "cuda"
    alone = run.accelerator.num_processes == 1  # others would wait forever for one that runs out of memory
    if on_gpu and alone and size <= GPU_SHARE * gpu_memory()[0]:
        with suppress(torch.OutOfMemoryError):
            beside = measure(run, run.config.batch_size).bytes
            if not step.optimizer.state:  # a resumed run has its moments already
                beside += 2 * run.trained_bytes()
    return choose_place(size, beside)


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    """Fine-tune with both losses; --preset seed, quick or full changes the defaults of some options."""

    dry_run: bool = False
    """Do not train: measure a step of the heaviest images, and print the memory and time that the run needs."""


def plan_training(config: TrainConfig) -> Plan:
    """What a run needs, and whether it fits on this machine.  Nothing is written.

    Raises:
        ConfigError, DataError, ModelError: as `train`.
    """
    free_models()
    room = gpu_memory()[1] if torch.cuda.is_available() else free_memory()
    try:
        run = Run(config)
        freeze_vision(run.model.network, not run.config.vision_trains(config.epochs - 1))
        weights, trained = sum(weight.nbytes for weight in run.model.network.parameters()), run.trained_bytes()
    except torch.OutOfMemoryError:
        run, weights = None, 4 * count_parameters(config.model)
        trained = 0 if config.lora else weights
    parts = {"weights": weights, "gradients": trained, "AdamW's two moments": 2 * trained}
    states = sum(parts.values())
    if states > room or run is None:
        cards = ", ".join(f"{gib(states / number)} on each of {number}" for number in (2, 4, 8))
        advice = f"it does not fit, even without images; shared out over cards it is {cards}: try --lora 16"
        return Plan(False, f"{table(parts, room)}\n{advice}, or a smaller model")
    return plan_step(run, parts, room)


def plan_step(run: Run, parts: dict[str, int], room: int) -> Plan:
    """`plan_training` of a run whose weights, gradients and moments (bytes in `parts`) fit."""
    size, found, batch, accumulation = run.config.batch_size, None, run.config.batch_size, run.config.accumulation
    on_gpu, states = run.compute.device.type == "cuda", sum(parts.values())
    if not on_gpu:
        size = 1  # a process that runs out of the host's memory is killed
    while size and not found:
        try:
            found = measure(run, size)
        except torch.OutOfMemoryError:
            size //= 2
    largest = 0
    if found:
        images = max(map(len, heaviest_parts(run, batch))) / max(map(len, heaviest_parts(run, size)))
        parts["activations"] = int(images * max(0, found.bytes - parts["gradients"]))
        largest = int(batch * (room - states) / max(1, parts["activations"]))
        largest = min(largest, size) if on_gpu else largest
    text = table(parts, room)
    if largest < batch:
        flags = (
            f"--batch-size {largest} --accumulation {math.ceil(accumulation * batch / largest)}, " if largest else ""
        )
        return Plan(False, f"{text}\nit does not fit: try {flags}--gradient-checkpointing or --lora 16")
    if run.config.caches_vision:
        kept, asked = features_bytes(run, run.kept_samples()), run.config.vision_cache
        place = choose_place(kept, sum(parts.values()) - parts["weights"]) if asked == "auto" else asked
        text += f"\n{'image features':22}{gib(kept):>10} " + ("not kept" if place == "off" else f"on the {place}")
    lengths = [tokens for *_, tokens in run.batches.lengths]
    step = found.seconds * batch / size
    epoch = step * run.batches.steps * sum(lengths) / len(lengths) / max(lengths)
    text += f"\na step of the heaviest images {step:.2f} s, the first passes {found.first:.1f} s"
    return Plan(True, f"{text}\nan epoch about {epoch / 60:.1f} min, without its validation\nit fits", epoch)


def table(parts: dict[str, int], room: int) -> str:
    """Bytes by part, their sum, and the free bytes."""
    rows = [f"{name:22}{gib(size):>10}" for name, size in {**parts, "together": sum(parts.values())}.items()]
    return "\n".join(rows) + f" of {gib(room)} that are free"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
