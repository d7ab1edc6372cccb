"""One training step: losses over a window of batches, their gradient, its clip and the update; what benchmarks time.

Also the learning rate and the weight of the attention loss, which change from step to step.
"""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, gather_object
from torch import nn

from ..model.collate import Batch
from ..model.device import Compute
from ..model.features import KeptFeatures
from .losses import LossParts

MOST_SKIPPED = 32
"""Steps skipped one after the other that end a run: the loss scale is 2**-32 of what it was, and no cure."""


def make_accelerator(compute: Compute) -> Accelerator:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    Precision is the compute's: accelerate's would be one for all that is made in a process.  On GPUs the processes
    can reduce tensors of the CPU, too.
    """
    on_gpu = compute.device.type == "cuda"
    launched = "LOCAL_RANK" in os.environ  # without processes to join, accelerate takes no backend
    return Accelerator(
        cpu=not on_gpu,  # else accelerate joins no processes there
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if launched and on_gpu else None,
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=on_gpu),  # `SizeBatches` is even
    )


class NonFiniteLoss(ValueError):
    """A loss is NaN or infinite; the message names which one, and the images."""


def make_optimizer(network: nn.Module, learning_rate: float, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW on all weights; matrices decay, norms and biases do not.  Frozen weights get no gradient, so no update."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""The learning rate after the warmup, as a part of the highest: a function of the part of the steps that is done."""


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """A linear rise over the first part of the steps, then one of SCHEDULES; step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return SCHEDULES[schedule]((step - rising) / max(1, steps - rising))


def lazy_weight(weight: float, every: int, step: int) -> float:
    """A step's weight of the attention loss: K times as strong on each K-th step, none between.

    So the expected gradient is the same at 1/K of the cost: the lazy regularisation of Karras et
    al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).
    """
    return weight * every if step % every == 0 else 0.0


class TrainingStep:
    """An optimizer step; call it with a window of batches.

    Nothing in a step waits for the GPU: its numbers stay there until `check` fetches those of many steps at once.
    In fp16 the loss is scaled up before the backward pass, and a step whose gradient overflows then is skipped and
    halves the scale (Micikevicius et al., "Mixed Precision Training", ICLR 2018); the weights stay float32.
    Several processes with a window each make the step, losses and norm of one process with all these windows.

    Args:
        loss: a `DualLoss`, or a module that is called as one; is moved to the accelerator's device.
        optimizer: of the loss's network; its learning rate is the caller's to set.
        accelerator: gives the processes.
        compute: device and precision.
        clip: largest norm of the gradient.

    Attributes:
        features: gives each batch its image features; None where the batches bring them, or pixels.
        skipped: steps so far without an update, as of the last `check`.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        compute: Compute,
        clip: float = 1.0,
    ):
        self.loss, self.optimizer, self.accelerator = loss.to(compute.device), optimizer, accelerator
        self.compute, self.clip = compute, clip
        self.trained: list[bool] = []  # which parameters trained when the loss was last wrapped
        self.features: KeptFeatures | None = None
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        self.skipped, self.in_a_row = 0, 0
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.unchecked: list[tuple[list[str], LossParts, torch.Tensor]] = []  # images, losses, gradient's norm

    def __call__(self, window: list[Batch], weight: float) -> tuple[LossParts, torch.Tensor]:
        """Accumulate the window's gradient, clip it and update the weights.

        Args:
            window: batches from `Collate` on the device; each answer token of it weighs the same, and each image
                with objects.
            weight: of this step's attention loss; 0 looks at no heatmap.

        Returns:
            The losses of all processes' windows, attention None where no image was looked at; and the gradient's norm
            before the clip: not finite where the step was skipped.
        """
        losses = self.gradient(window, weight)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)  # leaves weights and moments alone where the scaled gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad()
        self.unchecked.append(([name for batch in window for name in batch["names"]], losses, norm))
        return losses, norm

    def gradient(self, window: list[Batch], weight: float) -> LossParts:
        """Add the gradient of all processes' windows to the weights' gradients, times the loss scale in fp16.

        Returns the losses, summed over all windows.
        """
        self.wrap()
        answer_tokens = sum(batch["answer_tokens"] for batch in window)
        with_objects = sum(count > 0 for batch in window for count in batch["count"])
        # on the CPU, so that nothing waits for the GPU
        tokens, images = self.accelerator.reduce(torch.tensor([answer_tokens, with_objects]), "sum").tolist()
        losses = LossParts(*torch.zeros(3, device=self.compute.device))
        for i, batch in enumerate(window):
            batch = self.features.add_to(batch) if self.features and "image_features" not in batch else batch
            with self.accelerator.no_sync(self.loss) if i + 1 < len(window) else nullcontext():
                with self.compute.autocast():
                    parts = self.loss(batch, weight, tokens, images)
                self.scaler.scale(parts.total * self.accelerator.num_processes).backward()  # processes average it
            losses = LossParts(*(summed + part.detach() for summed, part in zip(losses, parts, strict=True)))
        losses = LossParts(*self.accelerator.reduce(torch.stack(losses), "sum"))
        return losses if weight and images else losses._replace(attention=None)

    def wrap(self) -> None:
        """Wrap the loss, with several processes, in a DDP, which averages their gradients.

        A DDP sees only once which weights train, so it is made anew whenever others do.
        """
        trained = [parameter.requires_grad for parameter in self.parameters]
        if self.trained and (trained == self.trained or self.accelerator.num_processes == 1):
            return
        self.loss = self.accelerator.unwrap_model(self.loss, keep_fp32_wrapper=False)
        self.loss, self.trained = self.accelerator.prepare(self.loss), trained

    def check(self) -> None:
        """Look at the losses and gradient norms of the steps since the last time: one wait for many steps.

        Raises:
            NonFiniteLoss: one is NaN or infinite; each process raises it, with the images of all.  In fp16 the norm
                may be, but not in MOST_SKIPPED steps on end.
        """
        steps, self.unchecked = self.unchecked, []
        numbers = [
            torch.stack([losses.count, losses.count if losses.attention is None else losses.attention, norm])
            for _, losses, norm in steps
        ]
        for (names, *_), values in zip(steps, torch.stack(numbers).tolist() if steps else [], strict=True):
            skipped = self.scaler.is_enabled() and not math.isfinite(values[2])
            for what, value in zip(("count loss", "attention loss", "gradient's norm"), values, strict=True):
                if not (math.isfinite(value) or skipped and what == "gradient's norm"):
                    cure = "lower the learning rate, or look at these images with `check`"
                    raise NonFiniteLoss(f"the {what} is {value} on {', '.join(gather_object(names))}: {cure}")
            self.skipped, self.in_a_row = self.skipped + skipped, self.in_a_row + 1 if skipped else 0
            if self.in_a_row >= MOST_SKIPPED:
                raise NonFiniteLoss(
                    f"the gradient overflows fp16 at every loss scale, in {MOST_SKIPPED} steps one after the other: "
                    "train with --precision fp32, or bf16 on a GPU that has it, or lower the learning rate"
                )
