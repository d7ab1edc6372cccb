"""`train --dry-run`: what a run needs on this machine, from one measured step of its longest images.

Left out: the run itself (`loop`), and what each card has room for (docs/cards.md).
"""

import math
from dataclasses import dataclass, replace

import torch

from ..model.collate import Collate, to_device
from ..model.device import free_memory, free_models, gpu_memory, memory_in_use, peak_memory, seconds_of
from ..model.load import count_parameters
from ..model.network import freeze_vision
from ..model.vision_cache import VisionCache, choose_place
from .loop import Run, TrainConfig
from .memory import features_size, longest_answers, longest_batch
from .step import lazy_weight


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    """Fine-tune with both losses; --preset seed, quick or full gives the options below other defaults."""

    dry_run: bool = False
    """Train nothing: measure a step of the longest images, and say what memory and time the run needs."""


@dataclass
class Plan:
    """What a run needs, in bytes and seconds; no seconds where the states leave no room for a step."""

    config: TrainConfig
    room: int  # of the GPU, or of the machine's memory
    base: int  # in use before the first step
    states: dict[str, int]  # weights, gradients, moments
    activations: int = 0
    cache: tuple[str, int] = ("off", 0)  # where image features lie, and how large they are
    step: float = math.nan
    first_step: float = math.nan  # which compiles
    epoch: float = math.nan  # without its validation

    @property
    def memory(self) -> dict[str, int]:
        """What takes up the room."""
        place, size = self.cache
        parts = {**self.states, "activations": self.activations, "vision cache": size if place == "gpu" else 0}
        return {name: size for name, size in parts.items() if size}

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room and not math.isnan(self.step)

    def __str__(self) -> str:
        place, size = self.cache
        rows = [f"{name:22}{_gib(size):>10}" for name, size in {**self.memory, "together": self.total}.items()]
        rows[-1] += f" of {_gib(self.room)} that are free"
        if place in ("host", "disk"):
            rows.append(f"{'vision cache':22}{_gib(size):>10} on the {place}")
        if self.fits:
            rows.append(f"a step of the longest images {self.step:.2f} s, the first {self.first_step:.1f} s")
            rows.append(f"an epoch about {_time(self.epoch)}, without its validation")
        return "\n".join(rows)


def plan_training(config: TrainConfig) -> list[Plan]:
    """Measure a run as it is asked for; where it does not fit, others too.  Nothing is written.

    Returns:
        The plan of the run itself; where it has no room, those of the others that have: a smaller batch (and a step
        in as many more parts), gradient checkpointing, adapters.

    Raises:
        ConfigError, DataError, ModelError: as `train` does.
    """
    plan = largest_that_fits(config, smallest=config.batch_size)
    if plan.fits:
        return [plan]
    checkpointed = replace(config, gradient_checkpointing=True)
    adapters = replace(checkpointed, lora=config.lora or 16, unfreeze_vision_at=None)
    others = [largest_that_fits(other) for other in dict.fromkeys((config, checkpointed, adapters))]
    return [plan, *(other for other in others if other.fits)]


def describe(plans: list[Plan]) -> str:
    """Plans as a person reads them."""
    first, *others = plans
    if first.fits:
        return f"{first}\nit fits"
    lines = [str(first), "it does not fit; what does:"]
    for plan in others:
        config = plan.config
        words = f"--batch-size {config.batch_size} --accumulation {config.accumulation}"
        words += f" --lora {config.lora}" * bool(config.lora)
        words += " --gradient-checkpointing" * config.gradient_checkpointing
        lines.append(f"  {words}: {_gib(plan.total)}, a step {plan.step:.2f} s, an epoch {_time(plan.epoch)}")
    if not others:
        lines.append("  nothing that was tried: take a smaller model, or make room")
    return "\n".join(lines)


def largest_that_fits(config: TrainConfig, smallest: int = 1) -> Plan:
    """The plan of the batch that is wanted or, where it has no room, of its half, its quarter ..."""
    free_models()
    on_gpu = torch.cuda.is_available()
    room = gpu_memory()[1] if on_gpu else free_memory()
    try:
        run = Run(config)
    except torch.OutOfMemoryError:  # the weights alone have no room
        return Plan(config, room, 0, {"weights": max(room + 1, 4 * count_parameters(config.model))})
    network = run.model.network
    freeze_vision(network, not run.config.vision_trains(run.config.epochs - 1))
    trained = sum(weight.nbytes for weight in network.parameters() if weight.requires_grad)
    states = {"weights": sum(weight.nbytes for weight in network.parameters()), "gradients": trained}
    states["AdamW's two moments"] = 2 * trained
    plan, size = Plan(run.config, room, memory_in_use(run.compute.device.type), states), config.batch_size
    if plan.total > room:
        return plan
    if not on_gpu:  # where memory ends there, the process does: one image says how many have room
        one = _measured(run, plan, 1).activations
        while (needed := one * max(map(len, longest_batch(run, size)))) + plan.total > room and size > smallest:
            size //= 2
        if plan.total + needed > room:
            return replace(plan, activations=needed)
    while size >= smallest and not plan.fits:
        try:
            plan = _measured(run, plan, size)
        except torch.OutOfMemoryError:
            run.training_step.unchecked.clear()
            run.training_step.optimizer.zero_grad()
            free_models()
        size //= 2
    return plan


def _measured(run: Run, plan: Plan, size: int) -> Plan:
    """The plan with a batch of so many images, from a step and a validation of the longest ones."""
    config, step, network = run.config, run.training_step, run.model.network
    device, lengths = run.compute.device, run.batches.lengths
    parts = run.batches.per_step * math.ceil(config.batch_size / size)
    cut, (answers, answer) = longest_batch(run, size), longest_answers(run)
    pixels, cache = not config.caches_vision or network.model.visual.pos_embed.weight.requires_grad, ("off", 0)
    collate = Collate(run.model.tokenizer, run.model.image_processor, pixels=pixels)
    if not pixels:
        kept = [*(sample for part in cut for sample in part), *answers]
        step.cache = VisionCache(run.model, kept, run.compute, "host")
        needed, together = features_size(run)
        cache = config.vision_cache, needed
    alike = min(2, parts)  # batches of the window
    window = [to_device(collate(part), device) for part in cut] * alike
    seconds, every = [], config.heatmap_every

    def train(weight: float) -> None:
        step.loss.train()
        seconds.append(seconds_of(lambda: step(window, weight), device.type))
        step.check()

    looking = lazy_weight(config.attention_weight, every, 0)
    train(looking)  # allocates what stays, and compiles
    peaks = peak_memory(lambda: train(looking), device.type), peak_memory(answer, device.type)  # None: not on a Mac
    _, gradients, moments = plan.states.values()
    stays = plan.base + moments + gradients, plan.base + moments  # beside activations, in a step and in a validation
    used = [int((peak or 0) * 2**20) - beside for peak, beside in zip(peaks, stays, strict=True)]
    if cache[0] == "auto":
        cache = choose_place(needed, max(gradients + used[0], used[1]) + together), needed
    if every > 1:
        train(0.0)
    mean = (seconds[1] + (every - 1) * seconds[-1]) / every / alike  # of a batch
    seen = sum(batch["input_ids"].numel() for batch in window) / alike
    padded = sum(max(lengths[i][2] for i, _ in part) * len(part) for batch in run.batches.epoch(0) for part in batch)
    return replace(
        plan, config=replace(config, batch_size=size, accumulation=parts), activations=max(0, *used), cache=cache,
        step=mean * parts, first_step=seconds[0], epoch=mean * padded / seen,
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
