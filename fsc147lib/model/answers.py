"""What a model says by itself: greedy decoding that goes on where the forced pass stops agreeing.

Left out: parsing (`prompt`), and the pass itself (`forward`).
"""

import torch
import torch.nn.functional as F

from .collate import Batch
from .forward import _compiled, _is_compiled, _narrow, text_layer


class Later:
    """A small tensor on its way to the CPU; `value` waits for it alone, not for what the device is told meanwhile."""

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


def agreement(batch: Batch, logits: torch.Tensor, end: int) -> Later:
    """How many of the answer's tokens the model says as it was told, before the first that differs or ends it.

    Args:
        logits: [B, A, V] of a forward pass.
        end: token that ends an answer.

    Returns:
        The least number of all rows, [].
    """
    said, told = logits.argmax(dim=-1), batch["answer_labels"]  # [B, A]
    return Later(((said == told) & (told != end)).cumprod(dim=1).sum(dim=1).min())


@torch.no_grad()
def greedy_tokens(network, batch: Batch, logits: torch.Tensor, agreed: Later, longest: int, end: int) -> torch.Tensor:
    """Go on greedily from the prompts of a batch whose pass kept its keys: what the model says by itself.

    That pass has shown already what the model says as long as this is what it was told; "COUNT: " at
    least, once it is trained.  The keys of all that it was told after that are masked out.

    Args:
        batch: whose "keys" an `answer_logits` pass has filled; they are used up.
        logits: [B, A, V] of that pass.
        agreed: its `agreement`.
        longest: tokens at the most.
        end: token that ends an answer.

    Returns:
        [B, up to longest] tokens; after an end only ends.
    """
    model = network.model.language_model
    known = int(agreed.value)
    tokens = list(logits[:, : known + 1].argmax(dim=-1).unbind(1))
    last = batch["answer_positions"][:, :1]  # where the answer's first token is predicted
    length = batch["input_ids"].shape[1]
    position = batch["position_ids"].gather(2, last.expand(3, -1, -1))  # [3, B, 1]
    mask = (torch.arange(length, device=last.device) <= last + known)[:, None, None]  # [B, 1, 1, T]
    past = batch["keys"]
    run = _compiled(text_layer) if _is_compiled(network) else text_layer
    unasked = 3 if last.is_cuda else 0  # steps before a GPU, which may have another pass to do first, is waited for
    while len(tokens) < longest and not (len(tokens) > known + unasked and (tokens[-1] == end).all()):
        hidden = _narrow(model.embed_tokens(tokens[-1][:, None]))
        cos, sin = model.rotary_emb(hidden, position + len(tokens))
        mask = F.pad(mask, (0, 1), value=True)
        for i, layer in enumerate(model.layers):
            hidden, _, past[i] = run(layer, hidden, cos, sin, mask, past=past[i], keep=True)
        token = network.lm_head(model.norm(hidden[:, 0])).argmax(dim=-1)
        tokens.append(torch.where(tokens[-1] == end, end, token))
    past.clear()
    return torch.stack(tokens, dim=1)


def count_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answer's tokens.

    Args:
        logits: [B, A, V] at the positions that predict the answer.
        labels: [B, A] the answer's tokens, -100 where an answer is shorter.

    Returns:
        Scalar in nats, *summed* over tokens: the caller divides by the tokens of the whole step, which
        is more than one batch when gradients are accumulated.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
