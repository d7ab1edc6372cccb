"""What changes from step to step: the learning rate, and the weight of the attention loss.

Left out: the step itself (`step`), and the epochs in which the vision encoder trains (`TrainConfig`).
"""

import math


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Linear rise over the first part of the steps, then half a cosine or a line to 0, or 1; step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done, falling = step - rising, max(1, steps - rising)
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * done / falling)), "linear": 1 - done / falling, "constant": 1.0,
    }[schedule]  # fmt: skip


def lazy_weight(weight: float, every: int, step: int) -> float:
    """A step's weight of the attention loss: K times as strong on each K-th step, none between.

    So the expected gradient is the same at 1/K of the cost: the lazy regularisation of Karras et
    al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).
    """
    return weight * every if step % every == 0 else 0.0
