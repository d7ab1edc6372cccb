"""Which training images make a batch, and which batches make a step."""

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
    """A training image as an epoch shows it: its number, and whether it is mirrored."""

    image: int
    mirrored: bool


Step: TypeAlias = list[list[Shown]]
"""The batches of an optimizer step, of all processes in turn."""


class TrainingImages(Dataset):
    """Samples as `SizeBatches` asks for them."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, shown: Shown) -> Sample:
        sample = self.samples[shown.image]
        return sample.flipped() if shown.mirrored else sample


class SizeBatches(Sampler):
    """Batches of images of like size, in an order that depends on seed and epoch alone.

    Each epoch shows each sample once.  It sorts them by length, cuts them into batches, and shuffles the batches.
    Chance decides each epoch anew which samples of like length meet, and which are mirrored.  Steps differ by at most
    one image, and so do batches, so all images weigh alike.  Iterates forever, so workers prefetch across epochs.

    Args:
        lengths: of each sample (rows, columns, tokens), see `Collate.lengths`.
        batch_size: most images of a batch.  Several processes need a batch each, so with a `batch_size` of 1 some
            batches of theirs hold 2.
        flip: whether half of the samples are mirrored.
        by_size: False leaves the sort out.
        accumulation: most batches of a process in a step.
        processes: number of processes; they take batches in turn, and equally many in each step.
        batch_tokens: most tokens of a forward pass, padding included.  A batch above it is cut into parts; a longer
            image is a part of its own.

    Attributes:
        steps: number of steps of an epoch.
        per_step: most batches of a process in a step, before they are cut into parts.

    Raises:
        ConfigError: fewer samples than processes; or `batch_tokens` with several processes, since their numbers of
            parts would differ.
    """

    drop_last = False  # accelerate asks

    def __init__(
        self,
        lengths: list[tuple[int, int, int]],
        batch_size: int,
        seed: int,
        flip: bool = True,
        by_size: bool = True,
        accumulation: int = 1,
        processes: int = 1,
        batch_tokens: int | None = None,
    ):
        if batch_tokens and processes > 1:
            raise ConfigError("batch_tokens (--batch-tokens) works in one process: give a smaller --batch-size")
        if len(lengths) < processes:
            raise ConfigError(f"{len(lengths)} training images are too few for {processes} processes: start fewer")
        self.batch_tokens = batch_tokens
        self.lengths, self.seed, self.flip, self.by_size = lengths, seed, flip, by_size
        self.processes, images = processes, batch_size * processes
        self.steps = min(math.ceil(len(lengths) / (images * accumulation)), len(lengths) // processes)
        together = math.ceil(len(lengths) / (images * self.steps)) * processes  # batches of a step
        sizes = shares(len(lengths), self.steps * together)
        self.batch_sizes = [sizes[first : first + together] for first in range(0, len(sizes), together)]  # of each step
        for step, sizes in enumerate(self.batch_sizes):
            if 0 in sizes:  # fewer images than batches
                self.batch_sizes[step] = shares(sum(sizes), sum(sizes) // processes * processes)
        self.per_step = max(map(len, self.batch_sizes)) // processes
        self.start(0)

    def start(self, epoch: int, done: int = 0) -> None:
        """Begin with this epoch, without its first `done` steps.

        Not called `set_epoch`: accelerate calls that with a count of its own, which starts anew in a resumed run.
        """
        self.first, self.done = epoch, done

    def __iter__(self) -> Iterator[list[Shown]]:
        for epoch in count(self.first):
            for step in self.epoch(epoch, self.done if epoch == self.first else 0):
                yield from step

    def sizes(self, epoch: int, done: int = 0) -> list[int]:
        """Forward passes of a process in each step of an epoch, without the first `done` steps."""
        return [len(step) // self.processes for step in self.epoch(epoch, done)]

    def epoch(self, epoch: int, done: int = 0) -> list[Step]:
        """The steps of an epoch, without the first `done`."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < 0.5 * self.flip).tolist()
        if self.by_size:  # within a few tokens, so that an image does not always meet the same others
            jitter = (3 * torch.rand(len(order), generator=generator)).tolist()
            order.sort(key=lambda i: self.lengths[i][2] + jitter[i])
        sizes = [size for step in self.batch_sizes for size in step]
        # the place in the epoch of the batch of the shortest images, of the next longer ones ...
        places = torch.randperm(len(sizes), generator=generator).argsort().tolist()
        rest, batches = iter(order), {}
        for place in places:
            # images of one size side by side, for the vision encoder
            images = sorted(islice(rest, sizes[place]), key=self.lengths.__getitem__)
            batches[place] = self.parts([Shown(i, mirrored[i]) for i in images])
        in_turn = map(batches.__getitem__, range(len(sizes)))
        steps = [list(chain.from_iterable(islice(in_turn, len(step)))) for step in self.batch_sizes]
        return steps[done:]

    def parts(self, batch: list[Shown]) -> list[list[Shown]]:
        """The batch in order, cut into as few parts of `batch_tokens` as possible, all of like weight.

        A part of few tokens would make torch compile a layer anew.
        """
        if not self.batch_tokens:
            return [batch]
        fewest = len(self.cut(batch, self.batch_tokens))
        low, high = 0, self.batch_tokens  # around the lowest limit that needs no more parts
        while low < high:
            middle = (low + high) // 2
            if len(self.cut(batch, middle)) > fewest:
                low = middle + 1
            else:
                high = middle
        return self.cut(batch, high)

    def cut(self, batch: list[Shown], most: int) -> list[list[Shown]]:
        """The batch in order, cut before each image that would take a part beyond `most` tokens."""
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
    """Whole numbers that differ by at most one and have this sum."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def make_loader(samples: list[Sample], batches: SizeBatches, collate: Callable, workers: int) -> DataLoader:
    """Training batches, read by `workers` processes; 0: by this one."""
    return DataLoader(
        TrainingImages(samples), batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None, **reader_options(workers),
    )  # fmt: skip


def windows(batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[list[Batch]]:
    """The batches of each optimizer step; `sizes` are their numbers."""
    rest = iter(batches)
    for size in sizes:
        yield list(islice(rest, size))
