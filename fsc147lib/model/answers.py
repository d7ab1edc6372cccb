"""A model's own answer: greedy decoding, and the loss of an answer.

Left out: parsing (`prompt`), the pass (`forward`), and how probable each number is (`counts`).
"""

import torch
import torch.nn.functional as F

from .collate import Batch
from .forward import Trace, answer_logits, continue_pass
from .layers import KeysValues
from .network import CountingModel
from .prompt import MAX_DIGITS


def count_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answer's tokens in nats, *summed*: logits [B, A, V], labels [B, A] with -100 where unused.

    The caller divides by the tokens of the whole step, which is more than one batch when gradients are accumulated.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def digits_score(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each answer's digits, or of the word chosen (`looking.with_word`): [B], in nats."""
    log_probability = logits.float().log_softmax(dim=-1)
    labels = batch["answer_labels"].clamp_min(0).unsqueeze(-1)
    digits = batch["digit_weights"] > 0  # [B, A]
    return (log_probability.gather(-1, labels)[..., 0] * digits).sum(dim=1)


class DeferredCopy:
    """A small tensor's copy on the CPU; `value` waits for the tensor alone, not for what the device does after it."""

    def __init__(self, tensor: torch.Tensor):
        self.copy = tensor.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrived:
            self.arrived.record()

    @property
    def value(self) -> torch.Tensor:
        if self.arrived:
            self.arrived.synchronize()
        return self.copy


def agreement(batch: Batch, logits: torch.Tensor, end: int) -> DeferredCopy:
    """How many tokens of all the right answers are predicted right in a forward pass over them, logits [B, A, V].

    The first that is not, or that ends an answer (`end`), is no longer counted.
    """
    predicted, target = logits.argmax(dim=-1), batch["answer_labels"]  # [B, A]
    return DeferredCopy(((predicted == target) & (target != end)).cumprod(dim=1).sum(dim=1).min())


@torch.no_grad()
def greedy_tokens(
    network,
    batch: Batch,
    logits: torch.Tensor,  # [B, A, V] of a pass over some answer to each, which is the forced one
    past: list[KeysValues],  # keys and values of that pass, which are used up
    agreed: DeferredCopy,  # `agreement` with it; the keys of its tokens after that are masked out
    longest: int,
    end: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Greedy answers to the prompts of a batch, decoded from where its forced pass stops agreeing with them.

    [B, up to `longest`] tokens; after an `end` only ends.
    """
    known = int(agreed.value)
    tokens = list(logits[:, : known + 1].argmax(dim=-1).unbind(1))
    last = batch["answer_positions"][:, :1]  # where the answer's first token is predicted
    length = batch["input_ids"].shape[1]
    position = batch["position_ids"].gather(2, last.expand(3, -1, -1))  # [3, B, 1]
    seen = (torch.arange(length, device=last.device) <= last + known)[:, None, None]  # [B, 1, 1, T]
    unchecked = 3 if last.is_cuda else 0  # steps before a GPU, which may have another pass to do first, is waited for
    while len(tokens) < longest and not (len(tokens) > known + unchecked and (tokens[-1] == end).all()):
        seen = F.pad(seen, (0, 1), value=True)
        after, _ = continue_pass(network, tokens[-1][:, None], position + len(tokens), seen, past, compiled=compiled)
        tokens.append(torch.where(tokens[-1] == end, end, after[:, 0].argmax(dim=-1)))
    past.clear()
    return torch.stack(tokens, dim=1)


def longest_answer(tokenizer) -> int:
    """Tokens of the longest answer that parses, its end included."""
    return len(tokenizer.encode("COUNT: " + "0" * MAX_DIGITS, add_special_tokens=False)) + 1


@torch.no_grad()
def own_answers(
    model: CountingModel, batch: Batch, longest: int | None = None
) -> tuple[list[list[int]], torch.Tensor, Trace]:
    """What a model (in eval mode) answers to the prompts of a batch, whatever answers the batch holds.

    Of each image the tokens up to the end of the answer or to `longest` (None: as long as parses), never none; and
    logits [B, A, V] and trace, with all keys, of the pass over the batch's answers.
    """
    end = model.tokenizer.eos_token_id
    logits, trace = answer_logits(model.network, batch, keep_keys=True)
    agreed = agreement(batch, logits, end)
    longest = longest or longest_answer(model.tokenizer)
    tokens = greedy_tokens(model.network, batch, logits, list(trace.keys_values), agreed, longest, end)
    return [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()], logits, trace
