"""One training step: losses over a window of batches, their gradient, its clip and the update; what benchmarks time.

Left out: which batches make a window, the learning rate, and on which steps the attention is looked at (`loop`).
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from ..model.collate import Batch
from ..model.vision_cache import VisionCache
from .losses import LossParts, NonFiniteLoss, check_finite

MOST_SKIPPED = 32
"""Steps skipped one after the other that end a run: the loss scale is 2**-32 of what it was, and no cure."""


def make_optimizer(network: nn.Module, learning_rate: float, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW on all weights; matrices decay, norms and biases do not.  Frozen weights get no gradient, so no update."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


class TrainingStep:
    """An optimizer step; call it with a window of batches.

    Nothing in a step waits for the GPU: its numbers stay there until `check` fetches those of many steps at once.
    In fp16 the loss is scaled up before the backward pass, and a step whose gradient overflows then is skipped and
    halves the scale (Micikevicius et al., "Mixed Precision Training", ICLR 2018); the weights stay float32.

    Args:
        loss: a `DualLoss`, or a module that is called as one; is moved to the accelerator's device.
        optimizer: of the loss's network; its learning rate is the caller's to set.
        accelerator: gives device, precision and processes.
        clip: largest norm of the gradient.
        cache: gives each batch its image features; None where the batches bring them, or pixels.

    Attributes:
        skipped: steps so far without an update, as of the last `check`.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        clip: float = 1.0,
        cache: VisionCache | None = None,
    ):
        self.loss, self.optimizer, self.accelerator = accelerator.prepare(loss), optimizer, accelerator
        self.clip, self.cache, self.scaler = clip, cache, accelerator.scaler  # None but in fp16
        self.skipped, self.in_a_row = 0, 0
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.unchecked: list[tuple[list[str], dict[str, torch.Tensor]]] = []  # steps whose numbers lie on the device

    def __call__(self, window: list[Batch], weight: float) -> tuple[LossParts, torch.Tensor]:
        """Accumulate the window's gradient, clip it and update the weights.

        Args:
            window: batches from `Collate` on the device; each answer token of it weighs the same, and each image
                with objects.
            weight: of this step's attention loss; 0 looks at no heatmap.

        Returns:
            The window's losses (with several processes this one's share), and the gradient's norm before the clip:
            not finite where the step was skipped.
        """
        tokens, images = self._sizes(window)
        summed = LossParts(*torch.zeros(3, device=self.accelerator.device))
        for i, batch in enumerate(window):
            batch = self.cache.add_to(batch) if self.cache and "image_features" not in batch else batch
            with self.accelerator.no_sync(self.loss) if i + 1 < len(window) else nullcontext():
                parts = self.loss(batch, tokens, images, weight)
                self.accelerator.backward(parts.total * self.accelerator.num_processes)  # whose gradients are averaged
            for name in ("total", "count", "attention"):
                setattr(summed, name, getattr(summed, name) + getattr(parts, name).detach())
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:  # a gradient that is not finite leaves weights and moments alone
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        numbers = {"count loss": summed.count, "attention loss": summed.attention, "gradient's norm": norm}
        self.unchecked.append(([name for batch in window for name in batch["names"]], numbers))
        if not (weight and any(any(batch["count"]) for batch in window)):
            summed.attention = None  # not looked at, which is not 0
        return summed, norm

    def _sizes(self, window: list[Batch]) -> tuple[int | torch.Tensor, int | torch.Tensor]:
        """Answer tokens and images with objects of a window, over all processes."""
        with_objects = sum(count > 0 for batch in window for count in batch["count"])
        sizes = [sum(batch["answer_tokens"] for batch in window), with_objects]
        if self.accelerator.num_processes == 1:
            return sizes[0], sizes[1]
        tokens, images = self.accelerator.reduce(torch.tensor(sizes, device=self.accelerator.device))
        return tokens, images

    def check(self) -> None:
        """Look at the losses and gradient norms of the steps since the last time: one wait for many steps.

        Raises:
            NonFiniteLoss: one is NaN or infinite; in fp16 the norm may be, but not in MOST_SKIPPED steps on end.
        """
        steps, self.unchecked = self.unchecked, []
        for skipped in check_finite(steps, "gradient's norm" if self.scaler is not None else ""):
            self.skipped, self.in_a_row = self.skipped + skipped, (self.in_a_row + 1) * skipped
            if self.in_a_row >= MOST_SKIPPED:
                raise NonFiniteLoss(
                    f"the gradient overflows fp16 at every loss scale, in {MOST_SKIPPED} steps one after the other: "
                    "train with --precision fp32, or bf16 on a GPU that has it, or lower the learning rate"
                )
