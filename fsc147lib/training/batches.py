"""Which training images make a batch, and which batches make a step."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import Sample
from ..model.collate import Batch
from ..options import ConfigError


class TrainingImages(Dataset):
    """Samples by number and whether mirrored, as `SizeBatches` asks for them."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, bool]) -> Sample:
        sample = self.samples[place[0]]
        return sample.flipped() if place[1] else sample


class SizeBatches(Sampler):
    """Batches of images of like size, in an order that depends on seed and epoch alone.

    Each epoch shows each sample once, and all weigh alike: batches differ by at most one image, and so do steps,
    and chance alone decides which are smaller.  Which samples of like length meet in a batch, which are
    mirrored, and the order of the batches change from epoch to epoch.  One epoch follows the other without an end, so
    that who reads ahead has the first batches of the next one ready when it begins.

    Args:
        lengths: of each sample (rows, columns, tokens), see `Collate.lengths`.
        by_size: False takes the samples as they come.
        batch_size, accumulation: images of a batch and batches of a step, at the most.
        processes: that share out the batches; `per_step` are those of a step of one.
        batch_tokens: cut a batch into parts of at most so many tokens, padding included, so that narrow and wide
            images need the same memory; an image that is longer is a part of its own.

    Attributes:
        steps: of an epoch.

    Raises:
        ConfigError: `batch_tokens`, and several processes, which would have different numbers of parts.
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
        self.batch_tokens = batch_tokens
        self.lengths, self.seed, self.flip, self.by_size = lengths, seed, flip, by_size
        self.processes, images = processes, batch_size * processes
        self.steps = math.ceil(len(lengths) / (images * accumulation))
        self.per_step = math.ceil(len(lengths) / (images * self.steps))
        self.number = self.steps * self.per_step * processes
        self.start(0)

    def start(self, epoch: int, done: int = 0) -> None:
        """Begin with this epoch, without its first steps that an interrupted run has done.

        Not called `set_epoch`: accelerate calls that with a count of its own, which starts anew in a resumed run.
        """
        self.first, self.done = epoch, done

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for epoch in count(self.first):
            for step in self.epoch(epoch, self.done if epoch == self.first else 0):
                yield from step

    def sizes(self, epoch: int, done: int = 0) -> list[int]:
        """How many batches, or parts of them, one process has in each step of an epoch."""
        return [len(step) // self.processes for step in self.epoch(epoch, done)]

    def epoch(self, epoch: int, done: int = 0) -> list[list[list[tuple[int, bool]]]]:
        """The batches of each step of an epoch but the first that are done, cut into parts; all processes' in turn."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < 0.5 * self.flip).tolist()
        if self.by_size:  # within a few tokens, so that an image does not always meet the same others
            jitter = (3 * torch.rand(len(order), generator=generator)).tolist()
            order.sort(key=lambda i: self.lengths[i][2] + jitter[i])
        drawn = torch.randperm(self.number, generator=generator).tolist()  # which batch is the first, the second ...
        ends = [len(order) * turn // self.number for turn in range(self.number + 1)]  # even, also step by step
        rest, batches = iter(order), {}
        for turn in sorted(range(self.number), key=drawn.__getitem__):  # from the shortest images to the longest
            batch = islice(rest, ends[turn + 1] - ends[turn])
            # images of one size side by side, for the vision encoder
            batches[turn] = [(i, mirrored[i]) for i in sorted(batch, key=self.lengths.__getitem__)]
        together = self.per_step * self.processes
        return [
            [part for turn in range(first, first + together) for part in self.parts(batches[turn])]
            for first in range(done * together, self.number, together)
        ]

    def parts(self, batch: list[tuple[int, bool]]) -> list[list[tuple[int, bool]]]:
        """The batch in order, in as few parts of `batch_tokens` as it takes, and these alike: torch compiles a layer
        anew for a part of few tokens."""
        if not self.batch_tokens:
            return [batch]
        fewest, limits = len(self.cut(batch, self.batch_tokens)), range(self.batch_tokens + 1)
        return self.cut(batch, bisect_left(limits, -fewest, key=lambda limit: -len(self.cut(batch, limit))))

    def cut(self, batch: list[tuple[int, bool]], most: int) -> list[list[tuple[int, bool]]]:
        """The batch in order, cut before the image that would fill a part beyond so many tokens."""
        parts: list[list[tuple[int, bool]]] = []
        longest = 0
        for place in batch:
            longest = max(longest, length := self.lengths[place[0]][2])
            if parts and (len(parts[-1]) + 1) * longest <= most:
                parts[-1].append(place)
            else:
                parts.append([place])
                longest = length
        return parts


def make_loader(samples: list[Sample], batches: SizeBatches, collate: Callable, workers: int) -> DataLoader:
    """Training batches, read by so many processes, or where that is 0 by this one."""
    return DataLoader(
        TrainingImages(samples), batch_sampler=batches, collate_fn=collate, num_workers=workers,
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
    )  # fmt: skip


def windows(batches: Iterable[Batch], sizes: Iterable[int]) -> Iterator[list[Batch]]:
    """Groups of so many batches each: what one optimizer step sees."""
    rest = iter(batches)
    for size in sizes:
        yield list(islice(rest, size))
