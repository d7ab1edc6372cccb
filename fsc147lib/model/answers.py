"""A model's own answers, and the loss of an answer."""

import torch
import torch.nn.functional as F

from .collate import Batch
from .forward import Prompts, read_prompts
from .network import CountingModel
from .prompt import longest_answer


def count_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the answer's tokens in nats: logits [B, A, V], labels [B, A] with -100 where unused."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def digits_score(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each answer's digits, or of `looking.with_word`'s word: [B], in nats."""
    log_probability = logits.float().log_softmax(dim=-1)
    labels = batch["answer_labels"].clamp_min(0).unsqueeze(-1)
    digits = batch["digit_weights"] > 0  # [B, A]
    return (log_probability.gather(-1, labels)[..., 0] * digits).sum(dim=1)


@torch.no_grad()
def own_answers(model: CountingModel, batch: Batch, longest: int | None = None) -> tuple[list[list[int]], Prompts]:
    """Tokens of a model's own answer to each image, up to its end or `longest`, and the questions as read.

    The model must be in eval mode.  None for `longest` is the longest answer that parses.
    """
    end, prompts = model.tokenizer.eos_token_id, read_prompts(model.network, batch)
    tokens = prompts.greedy(longest or longest_answer(model.tokenizer), end)
    return [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()], prompts
