"""How probable a model finds each number: the digits' probabilities, followed through a tree of all numbers.

P(37) is the probability of the whole answer "COUNT: 37": of "COUNT: ", of 3, of 7 after it, and of the end after
both.  All prefixes of one length are evaluated in one pass, each attending to the prompt and to its own digits.

Left out: what a distribution says (`prediction`), and whether it is right (`evaluation.metrics`).
"""

import torch

from .collate import Batch
from .forward import next_token_logits
from .layers import KeysValues
from .network import CountingModel, ModelError

COUNT_DIGITS = 4  # of the largest number that is followed; FSC147's largest count is 3,701
FOLLOWED = 128  # prefixes of each length that are followed further, the most probable; 900 follows all up to 999


def number_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of "COUNT: ", and of the ten digits; a ModelError where a digit is no token of its own."""
    prefix = tokenizer.encode("COUNT: ", add_special_tokens=False)
    digits = [token for digit in "0123456789" for token in tokenizer.encode(digit, add_special_tokens=False)]
    if tokenizer.encode("COUNT: 9876543210", add_special_tokens=False) != [*prefix, *reversed(digits)]:
        raise ModelError("the tokenizer does not write each digit as one token: probabilities of counts need that")
    return prefix, digits


@torch.no_grad()
def count_log_probabilities(
    model: CountingModel,
    batch: Batch,
    logits: torch.Tensor,
    past: list[KeysValues],
    digits: int = COUNT_DIGITS,
    followed: int = FOLLOWED,
) -> torch.Tensor:
    """Log-probability that the model's whole answer is "COUNT: n", for each n from 0 up.

    Args:
        batch: on the network's device; its answers begin with "COUNT: " and a number.
        logits, past: [B, A, V] and all layers' keys of a pass over the batch.

    Returns:
        [B, 10 ** digits] float64 on the CPU, -inf where fewer prefixes are followed than lead to the number.
        Spellings such as "007" belong to none.
    """
    prefix, digit_tokens = number_tokens(model.tokenizer)
    chosen = torch.tensor([*digit_tokens, model.tokenizer.eos_token_id], device=logits.device)
    first = len(prefix)  # the answer token that is the first digit
    labels = batch["answer_labels"][:, :first, None]
    start = logits[:, :first].float().log_softmax(dim=-1).gather(2, labels).double().sum(dim=(1, 2))  # of "COUNT: "
    score = start[:, None] + _log_softmax_of(logits[:, first], chosen[:10])  # [B, S] of S prefixes: the first digits
    numbers = torch.arange(10, device=logits.device).expand_as(score)
    before = batch["answer_positions"][:, first, None]  # where the first digit is predicted
    position = batch["position_ids"].gather(2, before.expand(3, -1, -1))  # [3, B, 1]
    prompt = torch.arange(batch["input_ids"].shape[1], device=logits.device) <= before  # [B, T]
    seen = score.new_zeros(*score.shape, 0, dtype=torch.bool)  # [B, S, K] which of the prefixes' tokens each attends to
    found, past = score.new_full((len(score), 10**digits), float("-inf")), list(past)
    for length in range(1, digits + 1):
        size = score.shape[1]
        itself = torch.eye(size, dtype=torch.bool, device=seen.device).expand(len(score), -1, -1)
        seen = torch.cat([seen, itself], dim=2)
        attended = torch.cat([prompt[:, None].expand(-1, size, -1), seen], dim=2)[:, None]
        after = next_token_logits(
            model.network, chosen[numbers % 10], (position + length).expand(-1, -1, size), attended, past
        )
        after = _log_softmax_of(after, chosen)  # [B, S, 11]
        found.scatter_(1, numbers, score + after[..., 10])
        if length < digits:
            further = score[..., None] + after[..., :10]  # [B, S, 10]
            further = further.masked_fill(numbers[..., None] == 0, float("-inf"))  # no number begins with a 0
            score, kept = further.flatten(1).topk(min(followed, 9 * 10**length), dim=1)
            parents = kept // 10
            numbers = 10 * numbers.gather(1, parents) + kept % 10
            seen = seen.gather(1, parents[..., None].expand(-1, -1, seen.shape[2]))
    return found.cpu()


def _log_softmax_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, [..., V] -> [..., tokens] float64, without a second table of the width of V."""
    wide = logits.float()
    return (wide[..., tokens] - wide.logsumexp(dim=-1, keepdim=True)).double()
