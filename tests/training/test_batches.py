"""For any number of images, batch size, accumulation and processes: no empty batch, each image once an epoch."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsc147lib.options import ConfigError
from fsc147lib.training.batches import SizeBatches

SIZES = st.sampled_from([(2, 3, 16), (4, 6, 34), (4, 6, 36), (4, 40, 170)])


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    lengths=st.lists(SIZES, min_size=1, max_size=70), batch_size=st.integers(1, 9), accumulation=st.integers(1, 9),
    processes=st.integers(1, 5), tokens=st.none() | st.integers(1, 400), by_size=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_no_batch_is_empty_and_each_image_comes_once(
    lengths, batch_size, accumulation, processes, tokens, by_size, seed
):
    tokens = tokens if processes == 1 else None
    options = {"by_size": by_size, "accumulation": accumulation, "processes": processes}
    if len(lengths) < processes:
        with pytest.raises(ConfigError, match=f"{len(lengths)} training images are too few for {processes} processes"):
            SizeBatches(lengths, batch_size, seed, **options)
        return
    batches = SizeBatches(lengths, batch_size, seed, **options)
    largest = batch_size if processes == 1 else max(batch_size, 2)
    cut = SizeBatches(lengths, batch_size, seed, batch_tokens=tokens, **options)
    for epoch in (0, 1):
        steps = batches.epoch(epoch)
        assert len(steps) == batches.steps
        assert Counter(i for step in steps for batch in step for i, _ in batch) == Counter(range(len(lengths)))
        sizes = [[len(batch) for batch in step] for step in steps]
        assert all(1 <= size <= largest for step in sizes for size in step)
        assert max(max(step) for step in sizes) - min(min(step) for step in sizes) <= 1
        assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
        rounds = [len(step) / processes for step in sizes]  # whole numbers: each process has a batch in each
        assert max(rounds) == batches.per_step and all(1 <= n <= accumulation and n == int(n) for n in rounds)
        parts = cut.epoch(epoch)
        assert [sorted(i for part in step for i in part) for step in parts] == [
            sorted(i for batch in step for i in batch) for step in steps
        ]
        assert all(part for step in parts for part in step)
    batches.start(4, done=batches.steps - 1)  # a resumed run begins within an epoch, and reads on into the next
    steps = [batches.epoch(4)[-1], *batches.epoch(5)]
    assert batches.sizes(4, batches.steps - 1) == [len(steps[0]) // processes]
    expected = [batch for step in steps for batch in step]
    assert list(islice(batches, len(expected))) == expected
