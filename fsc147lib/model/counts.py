"""How probable each number is as a model's whole answer: a search over the numbers' first digits.

Left out: the answer that a model gives (`answers`), and whether probabilities are right (`evaluation.metrics`).
"""

import math
from collections.abc import Callable

import torch

from .collate import Batch
from .forward import continue_pass
from .layers import KeysValues
from .network import CountingModel, ModelError

COUNT_DIGITS = 4  # of the largest number whose probability is followed; FSC147's largest count is 3,701
SHARE = 0.001  # not followed, of what was found, at which the search ends
AT_ONCE = 128  # prefixes that one pass follows, of each image


def number_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of "COUNT: ", and of the ten digits; a ModelError where a digit is no token of its own."""
    prefix = tokenizer.encode("COUNT: ", add_special_tokens=False)
    digits = [token for digit in "0123456789" for token in tokenizer.encode(digit, add_special_tokens=False)]
    if tokenizer.encode("COUNT: 9876543210", add_special_tokens=False) != [*prefix, *reversed(digits)]:
        raise ModelError("the tokenizer does not write each digit as one token: probabilities of counts need that")
    return prefix, digits


def follow_numbers(
    first: torch.Tensor, next_log_p: Callable[[torch.Tensor], torch.Tensor], digits: int = COUNT_DIGITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the numbers without leading zeros from 0 to 10 ** digits - 1, the most probable first digits first.

    A search ends when the prefixes that are left hold less than `SHARE` of what the numbers found hold.

    Args:
        first: [B, 10] float64 log-probability that an answer begins with each digit.
        next_log_p: called with prefixes [B, S], each written as its number, after the prefixes that are shorter by a
            digit; gives the log-probability, finite, of each digit and of the end after it, [B, S, 11].

    Returns:
        [B, 10 ** digits] log-probability of each number, -inf where it was not followed; and [B] the probability
        that was not followed: of all answers that begin as one of these, or as a number of more digits.
    """
    waiting = first.new_full((len(first), 10 ** (digits + 1)), -math.inf)  # prefixes; the longest are never followed
    waiting[:, :10] = first
    open_, found = waiting[:, : 10**digits], first.new_full((len(first), 10**digits), -math.inf)
    while (unsure := open_.logsumexp(dim=1) > found.logsumexp(dim=1) + math.log(SHARE)).any():
        size = min(AT_ONCE, int(open_[unsure].isfinite().sum(dim=1).min()))
        score, numbers = open_.topk(size, dim=1)  # [B, S]
        after = score[..., None] + next_log_p(numbers)  # [B, S, 11]
        further = after[..., :10].masked_fill(numbers[..., None] == 0, -math.inf)  # no number begins with a 0
        longer = 10 * numbers[..., None] + torch.arange(10, device=first.device)  # [B, S, 10]
        rest = waiting.scatter(1, numbers, -math.inf).scatter_reduce(1, longer.flatten(1), further.flatten(1), "amax")
        # an image whose search has ended stays as it is, whatever its neighbours need
        found = torch.where(unsure[:, None], found.scatter(1, numbers, after[..., 10]), found)
        waiting = torch.where(unsure[:, None], rest, waiting)
        open_ = waiting[:, : 10**digits]
    return found, waiting.exp().sum(dim=1)


@torch.no_grad()
def count_log_probabilities(
    model: CountingModel,
    batch: Batch,
    logits: torch.Tensor,  # [B, A, V] of a pass over the batch, whose answers begin with "COUNT: " and a number
    past: list[KeysValues],  # all layers' of that pass
    digits: int = COUNT_DIGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability that the model's whole answer is "COUNT: n" and an end, for each n from 0 up.

    Prefixes are evaluated many in one pass, each attending to the prompt and to its own digits.  [B, 10 ** digits]
    float64 on the CPU, and [B] the probability that was not followed, see `follow_numbers`.  Any other answer, such as
    "COUNT: 007", is none of these.
    """
    prefix, digit_tokens = number_tokens(model.tokenizer)
    chosen = torch.tensor([*digit_tokens, model.tokenizer.eos_token_id], device=logits.device)
    at = len(prefix)  # the answer token that is the first digit
    labels = batch["answer_labels"][:, :at, None]
    start = logits[:, :at].float().log_softmax(dim=-1).gather(2, labels).double().sum(dim=(1, 2))  # of "COUNT: "
    before = batch["answer_positions"][:, at, None]  # where the first digit is predicted
    position = batch["position_ids"].gather(2, before.expand(3, -1, -1))  # [3, B, 1]
    prompt = torch.arange(batch["input_ids"].shape[1], device=logits.device) <= before  # [B, T]
    powers = 10 ** torch.arange(digits, device=logits.device)
    followed = before[:, :0]  # [B, K] the prefixes whose last digits' keys stand behind the prompt's

    def next_log_p(numbers: torch.Tensor) -> torch.Tensor:
        nonlocal followed, past
        all_followed, grown = torch.cat([followed, numbers], dim=1), list(past)
        parts = numbers[..., None] // powers  # [B, S, digits] each prefix, and those that begin it
        parts = parts.masked_fill((parts == 0) & (powers > 1), -1)
        own = (parts[..., None] == all_followed[:, None, None]).any(dim=2)  # [B, S, K]
        seen = torch.cat([prompt[:, None].expand(-1, own.shape[1], -1), own], dim=2)[:, None]
        positions = position + (parts >= 0).sum(dim=2)
        after, _ = continue_pass(model.network, chosen[numbers % 10], positions, seen, grown)
        if (numbers < 10 ** (digits - 1)).any():  # else none of them is followed further
            followed, past = all_followed, grown
        return _log_softmax_of(after, chosen)

    found, rest = follow_numbers(start[:, None] + _log_softmax_of(logits[:, at], chosen[:10]), next_log_p, digits)
    return found.cpu(), rest.cpu()


def _log_softmax_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, [..., V] -> [..., tokens] float64, without a second table of the width of V."""
    wide = logits.float()
    return (wide[..., tokens] - wide.logsumexp(dim=-1, keepdim=True)).double()
