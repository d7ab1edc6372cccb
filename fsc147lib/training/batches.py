"""The order of training: the images of each batch, and the batches of each optimizer step."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from typing import NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import Sample
from ..model.collate import Batch
from ..options import ConfigError
from ..readers import reader_options


class Shown(NamedTuple):
    """Which training image an epoch shows, and whether it is mirrored."""

    image: int  # its index
    mirrored: bool


Step: TypeAlias = list[list[Shown]]
"""The batches of one optimizer step.  Several processes take them in turn."""


class TrainingImages(Dataset):
    """Samples, indexed by the `Shown` of `SizeBatches`."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, shown: Shown) -> Sample:
        sample = self.samples[shown.image]
        return sample.flipped() if shown.mirrored else sample


class SizeBatches(Sampler):
    """Batches of images of similar length, in an order that depends only on seed and epoch.

    An epoch shows each image once: images are sorted by length, cut into batches, and the batches are shuffled.
    Each epoch draws anew which images share a batch, and which are mirrored.  Steps differ by at most one image, and
    so do batches, so each image has about the same weight.  Iterates forever, so workers prefetch across epochs.

    Args:
        lengths: (rows, columns, tokens) of each sample, see `Collate.lengths`.
        batch_size: most images of a batch.  With several processes and a `batch_size` of 1, some batches hold 2.
        flip: mirror half of the images.
        by_size: sort by length; False leaves the order random.
        accumulation: most batches of one process in a step.
        processes: number of processes; each has the same number of batches in a step.
        batch_tokens: most tokens of a forward pass, padding included.  A larger batch is cut into parts; a longer
            image is a part of its own.

    Attributes:
        steps: number of steps of an epoch.
        per_step: most batches of one process in a step, counted before `batch_tokens` cuts them.

    Raises:
        ConfigError: fewer samples than processes, or `batch_tokens` with several processes.
    """

    drop_last = False  # accelerate reads it

    def __init__(
        self, lengths: list[tuple[int, int, int]], batch_size: int, seed: int, flip: bool = True, by_size: bool = True,
        accumulation: int = 1, processes: int = 1, batch_tokens: int | None = None,
    ):  # fmt: skip
        if batch_tokens and processes > 1:  # the processes' numbers of parts would differ
            raise ConfigError("batch_tokens (--batch-tokens) works in one process: give a smaller --batch-size")
        if len(lengths) < processes:
            raise ConfigError(f"{len(lengths)} training images are too few for {processes} processes: start fewer")
        self.lengths, self.seed, self.flip, self.by_size = lengths, seed, flip, by_size
        self.processes, self.batch_tokens = processes, batch_tokens
        images = batch_size * processes
        self.steps = min(math.ceil(len(lengths) / (images * accumulation)), len(lengths) // processes)
        batches = math.ceil(len(lengths) / (images * self.steps)) * processes  # of a step
        sizes = shares(len(lengths), self.steps * batches)
        self.batch_sizes = [sizes[first : first + batches] for first in range(0, len(sizes), batches)]  # of each step
        for step, sizes in enumerate(self.batch_sizes):
            if 0 in sizes:  # fewer images than batches
                self.batch_sizes[step] = shares(sum(sizes), sum(sizes) // processes * processes)
        self.per_step = max(map(len, self.batch_sizes)) // processes
        self.start(0)

    def start(self, epoch: int, done: int = 0) -> None:
        """Begin iteration with this epoch, after its first `done` steps.

        The name is not `set_epoch`: accelerate would call that with its own count, which starts at 0 on resuming.
        """
        self.first, self.done = epoch, done

    def __iter__(self) -> Iterator[list[Shown]]:
        for epoch in count(self.first):
            for step in self.epoch(epoch, self.done if epoch == self.first else 0):
                yield from step

    def sizes(self, epoch: int, done: int = 0) -> list[int]:
        """Number of forward passes of one process in each step of an epoch, after its first `done` steps."""
        return [len(step) // self.processes for step in self.epoch(epoch, done)]

    def epoch(self, epoch: int, done: int = 0) -> list[Step]:
        """The steps of an epoch after its first `done`."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < (0.5 if self.flip else 0)).tolist()
        if self.by_size:  # noise of up to 3 tokens, so that an image does not always meet the same neighbours
            noise = (3 * torch.rand(len(order), generator=generator)).tolist()
            order.sort(key=lambda i: self.lengths[i][2] + noise[i])
        sizes = [size for step in self.batch_sizes for size in step]
        batches: list[Step] = [[]] * len(sizes)
        end = 0
        for place in torch.randperm(len(sizes), generator=generator).argsort().tolist():  # of the next longer batch
            start, end = end, end + sizes[place]
            images = sorted(order[start:end], key=self.lengths.__getitem__)  # the encoder wants equal sizes together
            batches[place] = self.parts([Shown(i, mirrored[i]) for i in images])
        in_turn = iter(batches)
        steps = [list(chain.from_iterable(islice(in_turn, len(step)))) for step in self.batch_sizes]
        return steps[done:]

    def parts(self, batch: list[Shown]) -> list[list[Shown]]:
        """The batch in order, cut into as few parts of `batch_tokens` as possible, of similar numbers of tokens.

        torch would compile a layer anew for a part of few tokens.
        """
        if not self.batch_tokens:
            return [batch]
        fewest = len(self.cut(batch, self.batch_tokens))
        limit = sum(self.lengths[shown.image][2] for shown in batch) / fewest
        while limit < self.batch_tokens and len(self.cut(batch, limit)) > fewest:
            limit *= 1.02
        return self.cut(batch, min(limit, self.batch_tokens))

    def cut(self, batch: list[Shown], most: float) -> list[list[Shown]]:
        """The batch in order, cut before each image with which a part would exceed `most` tokens, padding included."""
        parts: list[list[Shown]] = []
        longest = 0
        for shown in batch:
            length = self.lengths[shown.image][2]
            longest = max(longest, length)
            if parts and (len(parts[-1]) + 1) * longest <= most:
                parts[-1].append(shown)
            else:
                parts.append([shown])
                longest = length
        return parts


def shares(total: int, parts: int) -> list[int]:
    """`parts` whole numbers with the sum `total` that differ by at most one."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def make_loader(samples: list[Sample], batches: SizeBatches, collate: Callable, workers: int) -> DataLoader:
    """A loader of training batches, read by `workers` processes; 0 reads in this process."""
    return DataLoader(
        TrainingImages(samples), batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None, **reader_options(workers),
    )  # fmt: skip


def windows(batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[list[Batch]]:
    """Group batches into optimizer steps; `sizes` are the steps' numbers of batches."""
    rest = iter(batches)
    for size in sizes:
        yield list(islice(rest, size))
