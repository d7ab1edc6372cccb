"""A model's own answers, how probable an answer is, and how probable each number is as the whole answer."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .collate import Batch
from .forward import Prompts, read_prompts
from .network import CountingModel
from .prompt import longest_answer, number_tokens

COUNT_DIGITS = 4  # of the largest number that is followed; FSC147's largest count is 3,701
SHARE = 0.001  # the search ends where open prefixes hold less, as a share of the numbers found
AT_ONCE = 128  # prefixes of each image in a pass


def count_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [B, A, V] and labels [B, A], summed over the labels that are not -100, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def digits_score(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of the answer tokens with `digit_weights` above 0, summed for each image: [B], in nats."""
    log_probability = logits.float().log_softmax(dim=-1)
    labels = batch["answer_labels"].clamp_min(0).unsqueeze(-1)
    digits = batch["digit_weights"] > 0  # [B, A]
    return (log_probability.gather(-1, labels)[..., 0] * digits).sum(dim=1)


@torch.no_grad()
def own_answers(model: CountingModel, batch: Batch, longest: int | None = None) -> tuple[list[list[int]], Prompts]:
    """Tokens of a model's greedy answer to each image, and the questions as `read_prompts` gives them.

    An answer has up to `longest` tokens; None: as the longest that parses.  The model must be in eval mode.
    """
    end, prompts = model.tokenizer.eos_token_id, read_prompts(model.network, batch)
    tokens = prompts.greedy(longest or longest_answer(model.tokenizer), end)
    return [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()], prompts


def answer_texts(model: CountingModel, batch: Batch) -> list[str]:
    """The text of each answer in a batch, without special tokens."""
    ids = [[token for token in row if token >= 0] for row in batch["answer_labels"].tolist()]
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def follow_numbers(
    first: torch.Tensor, next_log_p: Callable[[torch.Tensor], torch.Tensor], digits: int = COUNT_DIGITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the numbers from 0 to 10 ** digits - 1, the most probable first digits first.

    Args:
        first: [B, 10] float64 log-probability that an answer begins with each digit.
        next_log_p: takes prefixes [B, S] as numbers, shorter ones first; gives the finite log-probability of each
            digit and of the end after them, [B, S, 11].

    Returns:
        [B, 10 ** digits] log-probability of each number, -inf if the search ended before it, and [B] the probability
        of the answers that begin as such a number or as one with more digits.
    """
    waiting = first.new_full((len(first), 10 ** (digits + 1)), -math.inf)  # prefixes; the longest are never followed
    waiting[:, :10] = first
    open_, found = waiting[:, : 10**digits], first.new_full((len(first), 10**digits), -math.inf)
    while (unsure := open_.logsumexp(dim=1) > found.logsumexp(dim=1) + math.log(SHARE)).any():
        size = min(AT_ONCE, int(open_[unsure].isfinite().sum(dim=1).min()))
        score, numbers = open_.topk(size, dim=1)  # [B, S]
        after = score[..., None] + next_log_p(numbers)  # [B, S, 11]
        further = after[..., :10].masked_fill(numbers[..., None] == 0, -math.inf)  # no leading zeros
        longer = 10 * numbers[..., None] + torch.arange(10, device=first.device)  # [B, S, 10]
        rest = waiting.scatter(1, numbers, -math.inf).scatter_reduce(1, longer.flatten(1), further.flatten(1), "amax")
        # an image whose search has ended stays as it is
        found = torch.where(unsure[:, None], found.scatter(1, numbers, after[..., 10]), found)
        waiting = torch.where(unsure[:, None], rest, waiting)
        open_ = waiting[:, : 10**digits]
    return found, waiting.exp().sum(dim=1)


@torch.no_grad()
def count_log_probabilities(
    model: CountingModel, prompts: Prompts, digits: int = COUNT_DIGITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability that the model's whole answer is `prompt.answer(n)`, for n from 0 to 10 ** digits - 1.

    Returns [B, 10 ** digits] float64 on the CPU, and [B] the probability that was not followed, as `follow_numbers`.
    """
    # a pass evaluates many prefixes, each of which attends to the question and to its own digits
    prefix, digit_tokens, after_number = number_tokens(model.tokenizer)
    device, size = prompts.seen.device, 1 + len(prefix)
    chosen = torch.tensor([*digit_tokens, after_number], device=device)
    start = torch.tensor(prefix, device=device).expand(len(prompts.seen), -1)  # [B, P]
    positions = prompts.last_position + torch.arange(size, device=device)
    causal = torch.ones(1, size, size, dtype=torch.bool, device=device).tril()
    logits, _ = prompts.go_on(torch.cat([prompts.last_token, start], dim=1), positions, causal)
    begun = logits[:, :-1].float().log_softmax(dim=-1).gather(2, start[..., None]).double().sum(dim=(1, 2))
    powers = 10 ** torch.arange(digits, device=device)
    followed = start[:, :0]  # [B, N] the prefixes whose last digits' keys stand in the cache

    def next_log_p(numbers: torch.Tensor) -> torch.Tensor:
        nonlocal followed
        parts = numbers[..., None] // powers  # [B, S, digits] each prefix, and those that begin it
        parts = parts.masked_fill((parts == 0) & (powers > 1), -1)
        all_followed = torch.cat([followed, numbers], dim=1)
        own = (parts[..., None] == all_followed[:, None, None]).any(dim=2)  # [B, S, N + S]
        places = positions[..., -1:] + (parts >= 0).sum(dim=2)
        after, _ = prompts.go_on(chosen[numbers % 10], places, F.pad(own, (size, 0), value=True))
        if (numbers < 10 ** (digits - 1)).any():
            followed = all_followed
        else:  # none of them is followed further
            prompts.forget(numbers.shape[1])
        return _log_softmax_of(after, chosen)

    found = follow_numbers(begun[:, None] + _log_softmax_of(logits[:, -1], chosen[:10]), next_log_p, digits)
    prompts.forget(size + followed.shape[1])
    return tuple(x.cpu() for x in found)


def _log_softmax_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, [..., V] -> [..., tokens] float64, without a second tensor of width V."""
    wide = logits.float()
    return (wide[..., tokens] - wide.logsumexp(dim=-1, keepdim=True)).double()
