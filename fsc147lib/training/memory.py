"""What a run's longest step and longest validation need of memory, by doing them; nothing is updated.

Left out: what is told of it, and what else would fit (`plan`); where image features lie then (`model.vision_cache`).
"""

from collections.abc import Callable

import torch

from ..data import Sample
from ..evaluation.answering import answering_batch_size, evaluate_samples
from ..model.collate import to_device
from ..model.device import free_models, memory_in_use, peak_memory
from ..model.vision_cache import VisionCache


def in_parts(run, images: list[int]) -> list[list[Sample]]:
    """Training images of a `Run` by number, in the parts that --batch-tokens cuts a batch of them into."""
    parts = run.batches.parts([(i, False) for i in images])
    return [[run.samples["train"][i] for i, _ in part] for part in parts]


def longest_batch(run, size: int) -> list[list[Sample]]:
    """So many of the longest training images, in parts."""
    lengths = run.batches.lengths
    return in_parts(run, sorted(range(len(lengths)), key=lambda i: lengths[i][2])[-size:])


def longest_answers(run, size: int) -> tuple[list[Sample], Callable[[], object]]:
    """The longest validation images, two batches of them where `size` are trained on, since the second's pass begins
    before the first's answers are there; and a function that answers them."""
    lengths = [run.collate.lengths(sample)[2] for sample in run.samples["val"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    many = answering_batch_size(size, run.heatmap, run.config.batch_tokens, lengths[order[-1]])
    samples = [run.samples["val"][i] for i in order[-2 * many :]]

    def answer() -> None:
        cache = run.training_step.cache
        evaluate_samples(run.model, samples, many, run.heatmap, run.accelerator, cache=cache)

    return samples, answer


def memory_of_step(run) -> int:
    """Bytes of the GPU that a run with kept image features takes at the most, beside what is in use and the features.

    Measured on the longest images: two passes forward and back, and a validation; they compile what the first step
    would.  All of the GPU where there is no room for them.
    """
    step, parts = run.training_step, longest_batch(run, run.config.batch_size)
    answers, answer = longest_answers(run, run.config.batch_size)
    before, trained = memory_in_use("cuda"), sum(p.nbytes for p in step.parameters if p.requires_grad)
    moments = 0 if step.optimizer.state else 2 * trained  # a run that goes on has them already
    step.loss.train()  # or layers would keep what --gradient-checkpointing lets them forget
    try:
        samples = [*(sample for part in parts for sample in part), *answers]
        step.cache = VisionCache(run.model, samples, run.accelerator, "host", compiled=run.heatmap.compiled)
        batches = [to_device(run.loader.collate_fn(part), run.accelerator.device) for part in parts]
        window = batches * (1 if len(batches) > 1 else 2)  # the second has the gradient of the first beside it
        peaks = []
        for use in (lambda: step.gradient(window, run.config.attention_weight), answer):
            use()  # compiles
            peaks.append(peak_memory(use, "cuda"))
            step.optimizer.zero_grad()
        return int(max(peaks) * 2**20) - before + moments
    except torch.OutOfMemoryError:
        step.optimizer.zero_grad()
        return torch.cuda.mem_get_info()[1]
    finally:
        free_models()
