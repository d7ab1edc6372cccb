"""`train --dry-run`: what a run needs on this machine, measured on its heaviest images."""

import math
from dataclasses import dataclass, replace

import torch

from ..model.device import free_memory, free_models, gpu_memory
from ..model.load import count_parameters
from ..model.network import freeze_vision
from .memory import choose_place, features_bytes, heaviest_parts, measure
from .setup import Run, TrainConfig


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    """Fine-tune with both losses; --preset seed, quick or full gives the options below other defaults."""

    dry_run: bool = False
    """Train nothing: measure a step of the heaviest images, and say what memory and time the run needs."""


@dataclass
class Plan:
    """What a run needs, in bytes and seconds."""

    config: TrainConfig
    room: int  # that is free, of the GPU or of the machine
    parts: dict[str, int]  # weights, gradients, moments, activations, and features where they lie there
    features: tuple[str, int] = ("off", 0)  # where kept image features lie, and their bytes
    first: float = math.nan  # seconds of the first pass, which compiles
    step: float = math.nan  # of a step of the heaviest images
    epoch: float = math.nan  # without its validation

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room and not math.isnan(self.step)

    def __str__(self) -> str:
        place, size = self.features
        rows = [f"{name:22}{_gib(size):>10}" for name, size in {**self.parts, "together": self.total}.items()]
        rows[-1] += f" of {_gib(self.room)} that are free"
        if place in ("host", "disk"):
            rows.append(f"{'image features':22}{_gib(size):>10} on the {place}")
        if self.fits:
            rows.append(f"a step of the heaviest images {self.step:.2f} s, the first pass {self.first:.1f} s")
            rows.append(f"an epoch about {_time(self.epoch)}, without its validation")
        return "\n".join(rows)


def plan_training(config: TrainConfig) -> list[Plan]:
    """The plan of a run; where it has no room, also plans of others that have: a smaller batch (and a step in as many
    more parts), gradient checkpointing, adapters.  Nothing is written.

    Raises:
        ConfigError, DataError, ModelError: as `train` does.
    """
    plan = make_plan(config)
    if plan.fits:
        return [plan]
    checkpointed = replace(config, gradient_checkpointing=True)
    adapters = replace(checkpointed, lora=config.lora or 16, unfreeze_vision_at=None)
    return [plan, *filter(None, map(largest_that_fits, dict.fromkeys((config, checkpointed, adapters))))]


def largest_that_fits(config: TrainConfig) -> Plan | None:
    """The plan with the largest batch that has room: half of the one that is wanted, or a quarter ..."""
    whole = config
    while config.batch_size >= 1:
        plan = make_plan(config)
        if plan.fits:
            return plan
        if config.batch_size == 1:
            break
        size = config.batch_size // 2
        accumulation = math.ceil(whole.accumulation * whole.batch_size / size)
        config = replace(config, batch_size=size, accumulation=accumulation)
    return None


def make_plan(config: TrainConfig) -> Plan:
    """Measure a run as it is asked for; where its states have no room, count them."""
    free_models()
    on_gpu = torch.cuda.is_available()
    room = gpu_memory()[1] if on_gpu else free_memory()
    try:
        run = Run(config)
    except torch.OutOfMemoryError:
        return Plan(config, room, {"weights": max(room + 1, 4 * count_parameters(config.model))})
    freeze_vision(run.model.network, not run.config.vision_trains(run.config.epochs - 1))
    weights = list(run.model.network.parameters())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    parts = {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": trained,
        "AdamW's two moments": 2 * trained,
    }
    plan = Plan(run.config, room, parts)
    if plan.total > room:
        return plan
    size = config.batch_size
    try:
        needs = measure(run, size if on_gpu else 1)  # without room on a CPU the process would die
    except torch.OutOfMemoryError:
        parts["activations"] = room
        return plan
    images = 1 if on_gpu else max(map(len, heaviest_parts(run, size)))
    parts["activations"] = max(0, images * (needs.step - trained), needs.answers)
    if run.config.caches_vision:
        kept, place = features_bytes(run), str(run.config.vision_cache)
        if place == "auto":
            place = choose_place(kept, max(needs.step, needs.answers) + 2 * trained + needs.window)
        plan.features = place, kept
        if place == "gpu":
            parts["image features"] = kept
    lengths = [tokens for *_, tokens in run.batches.lengths]
    plan.first, plan.step = needs.first, needs.seconds * (1 if on_gpu else config.batch_size)
    plan.epoch = plan.step * run.batches.steps * sum(lengths) / len(lengths) / max(lengths)
    return plan


def describe(plans: list[Plan]) -> str:
    """Plans as a person reads them."""
    first, *others = plans
    if first.fits:
        return f"{first}\nit fits"
    lines = [str(first), "it does not fit; what does:"]
    for plan in others:
        config = plan.config
        words = f"--batch-size {config.batch_size} --accumulation {config.accumulation}"
        if config.lora:
            words += f" --lora {config.lora}"
        if config.gradient_checkpointing:
            words += " --gradient-checkpointing"
        lines.append(f"  {words}: {_gib(plan.total)}, a step {plan.step:.2f} s, an epoch {_time(plan.epoch)}")
    if not others:
        lines.append("  nothing that was tried: take a smaller model, or make room")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
