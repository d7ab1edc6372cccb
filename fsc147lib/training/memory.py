"""What a run's longest step and longest validation need of memory, by doing them; nothing is updated.

Left out: what is told of it, and what else would fit (`plan`); where image features lie then (`model.vision_cache`).
"""

from collections.abc import Callable

import torch

from ..data import Sample
from ..evaluation.answering import answering_tokens, evaluate_samples
from ..model.collate import to_device
from ..model.device import free_models, memory_in_use, peak_memory
from ..model.vision_cache import GPU_SHARE, VisionCache
from .batches import Shown


def in_parts(run, images: list[int]) -> list[list[Sample]]:
    """Training images of a `Run` by number, in the parts that --batch-tokens cuts a batch of them into."""
    parts = run.batches.parts([Shown(i, False) for i in images])
    return [[run.samples["train"][i] for i, _ in part] for part in parts]


def longest_batch(run, size: int) -> list[list[Sample]]:
    """So many of the longest training images, in as many passes as they need; with --batch-tokens each of these is the
    heaviest one that there can be: of images somewhat shorter more may have room, and they come closer to the limit."""
    lengths = [tokens for *_, tokens in run.batches.lengths]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts, limit = in_parts(run, order[-size:]), run.config.batch_tokens
    if not limit:
        return parts
    many = [min(size, place + 1, max(1, limit // lengths[i])) for place, i in enumerate(order)]
    last = max(range(len(order)), key=lambda place: (many[place] * lengths[order[place]], place))
    heaviest = [run.samples["train"][i] for i in order[last + 1 - many[last] : last + 1]]
    return [heaviest] * len(parts)


def pass_tokens(run) -> int:
    """Tokens of a run's heaviest training pass, padding included."""
    longest = max(tokens for *_, tokens in run.batches.lengths)
    return run.config.batch_tokens or run.config.batch_size * longest


def longest_answers(run) -> tuple[list[Sample], Callable[[], object]]:
    """The longest validation images that are answered at once, and a function that answers them."""
    tokens = answering_tokens(pass_tokens(run), run.heatmap)
    lengths = [run.collate.lengths(sample)[2] for sample in run.samples["val"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    samples = [run.samples["val"][i] for i in order[-max(1, tokens // lengths[order[-1]]) :]]

    def answer() -> None:
        cache = run.training_step.cache
        evaluate_samples(run.model, samples, 1, run.heatmap, run.compute, cache=cache, batch_tokens=tokens)

    return samples, answer


def features_size(run) -> tuple[int, int]:
    """Bytes of a run's kept image features, mirror images among them, and of a step's images at the most."""
    vision, narrow = run.model.network.config.vision_config, run.compute.precision != "fp32"
    of_token = (1 + len(vision.deepstack_visual_indexes)) * vision.out_hidden_size * (2 if narrow else 4)
    tokens = sorted(rows * columns // 4 for rows, columns, _ in run.batches.lengths)
    answered = [run.collate.lengths(sample) for sample in run.samples["val"]]
    kept = (1 + run.config.flip) * sum(tokens) + sum(rows * columns // 4 for rows, columns, _ in answered)
    return kept * of_token, sum(tokens[-run.config.batch_size * run.batches.per_step :]) * of_token


def memory_of_step(run) -> int:
    """Bytes of the GPU that a run with kept image features takes at the most, beside what is in use and the features.

    Measured on the longest images: passes forward and back, and a validation; they compile what the first step would.
    All of the GPU where there is no room for them, where the features have none anyway, and with several processes,
    which would wait for the one that ran out.
    """
    step, config, whole = run.training_step, run.config, torch.cuda.mem_get_info()[1]
    features, window_features = features_size(run)
    if features > GPU_SHARE * whole or run.accelerator.num_processes > 1:
        return whole
    parts, (answers, answer) = longest_batch(run, config.batch_size), longest_answers(run)
    passes = len(parts) * run.batches.per_step
    before, trained = memory_in_use("cuda"), sum(p.nbytes for p in step.parameters if p.requires_grad)
    moments = 0 if step.optimizer.state else 2 * trained  # a run that goes on has them already
    step.loss.train()  # or layers would keep what --gradient-checkpointing lets them forget
    try:
        samples = [*parts[0], *answers]
        step.cache = VisionCache(run.model, samples, run.compute, "host", workers=run.workers)
        # a second pass has the gradient of the first beside it
        window = [to_device(run.collate(parts[0]), run.compute.device)] * min(2, passes)
        peaks = []
        for use in (lambda: step.gradient(window, config.attention_weight), answer):
            use()  # compiles
            step.optimizer.zero_grad()
            peaks.append(peak_memory(use, "cuda"))
            step.optimizer.zero_grad()
        return int(max(peaks) * 2**20) - before + moments + window_features
    except torch.OutOfMemoryError:
        return whole
    finally:
        step.cache = None
        step.optimizer.zero_grad()
        free_models()
