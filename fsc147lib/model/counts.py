"""How probable each number is as a model's whole answer: a search over the numbers' first digits."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .forward import Prompts
from .network import CountingModel
from .prompt import number_tokens

COUNT_DIGITS = 4  # of the largest number that is followed; FSC147's largest count is 3,701
SHARE = 0.001  # the search ends where open prefixes hold less, as a share of the numbers found
AT_ONCE = 128  # prefixes of each image in a pass


def follow_numbers(
    first: torch.Tensor, next_log_p: Callable[[torch.Tensor], torch.Tensor], digits: int = COUNT_DIGITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the numbers from 0 to 10 ** digits - 1, the most probable first digits first.

    Args:
        first: [B, 10] float64 log-probability that an answer begins with each digit.
        next_log_p: takes prefixes [B, S] as numbers, shorter ones first; gives the finite log-probability of each
            digit and of the end after them, [B, S, 11].

    Returns:
        [B, 10 ** digits] log-probability of each number, -inf where it was not followed, and [B] the probability of
        answers that begin as these, or as a number of more digits.
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
    """Log-probability that the model's whole answer is `prompt.answer(n)`, for each n from 0 up.

    A pass evaluates many prefixes, each attending to the question and to its own digits.  Returns [B, 10 ** digits]
    float64 on the CPU, and [B] the probability that was not followed (see `follow_numbers`).
    """
    prefix, digit_tokens, after_number = number_tokens(model.tokenizer)
    device, size = prompts.seen.device, 1 + len(prefix)
    chosen = torch.tensor([*digit_tokens, after_number], device=device)
    start = torch.tensor(prefix, device=device).expand(len(prompts.seen), -1)  # [B, P]
    positions = prompts.last_position + torch.arange(size, device=device)
    causal = torch.ones(1, size, size, dtype=torch.bool, device=device).tril()
    logits, _ = prompts.go_on(torch.cat([prompts.last_token, start], dim=1), positions, causal)
    begun = logits[:, :-1].float().log_softmax(dim=-1).gather(2, start[..., None]).double().sum(dim=(1, 2))
    powers = 10 ** torch.arange(digits, device=device)
    followed = start[:, :0]  # [B, N] the prefixes whose last digits' keys stand behind what comes before them

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
