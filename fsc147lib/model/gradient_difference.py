"""A loss on a gradient, trained by first derivatives alone.

Let g(theta) be the gradient of a score s with respect to states x, and L a loss of g.  With u = dL/dg held fixed,
dL/dtheta = d/de [ds/dtheta at x + e u]: one mixed product, here a central difference of two ordinary gradients
(Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994).  These passes are compiled and on the fast attention,
which autograd's own second derivative is not; the price is the difference's error, which grows with the square of its
step, and rounding, which grows as the step shrinks.

Left out: what is made of the gradient (`heatmaps`).
"""

import torch

from ..options import ConfigError
from .answers import digits_score
from .collate import Batch
from .forward import answer_logits, encode_images

STEP = 0.03
"""Length of the difference's step, beside the length of an image's states: bfloat16 rounds smaller ones away."""


def gradients_by_difference(heatmap, batch: Batch, compiled: bool = False, **kwargs):
    """Gradients of the digits' log-probability with respect to the states entering `heatmap.state_layer`.

    Returned are logits (without a graph) and trace of a pass, its states, and their gradients, whose graph ends in a
    function that adds to the weights' gradients.  Several processes are a ConfigError: each of them would count a
    weight's gradient as finished too early.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError("gradient_method is 'difference', which works in one process: choose 'exact'")
    network, kind = heatmap.network, batch["input_ids"].device.type
    if not any(weight.requires_grad for weight in network.model.visual.parameters()):  # then all passes share this one
        with torch.no_grad():
            encoded = encode_images(network, batch, compiled=compiled)
        batch = {**batch, "image_features": torch.stack(encoded, dim=1)}
    kwargs |= {"gradient_from": heatmap.state_layer, "keeps_graph": False, "compiled": compiled}
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    try:  # here the weights are constants
        for weight in trained:
            weight.requires_grad_(False)
        logits, trace = answer_logits(network, batch, **kwargs)
        gradients = torch.autograd.grad(digits_score(logits, batch).sum(), trace.inputs)
    finally:
        for weight in trained:
            weight.requires_grad_(True)
    states = [x.detach() for x in trace.inputs]
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def add_to_weights(by_state, by_gradient) -> None:
        """Backward of the loss, whose derivatives by the states and by their gradients these are."""
        steps = _steps(states, by_gradient, batch)  # [B]
        owners = batch["visual_index"] // batch["input_ids"].shape[1]  # [V] the image of each visual token
        for signed in (steps, -steps):
            moved = [by * (signed[:, None, None] if by.ndim == 3 else signed[owners, None]) for by in by_gradient]
            shift = [by.to(state) for by, state in zip(moved, states, strict=True)]
            with torch.enable_grad(), torch.autocast(kind, **autocast):
                shifted, there = answer_logits(network, batch, shift=shift, **kwargs)
                total = (digits_score(shifted, batch) / (2 * signed)).sum()
                if signed is steps:  # what the states themselves do to the loss, where weights below make them
                    total = total + sum((x * by).sum() for x, by in zip(there.inputs, by_state, strict=True))
            total.backward()

    leaves = [x.detach().requires_grad_() for x in (*states, *gradients)]
    traced = _Traced.apply(add_to_weights, *leaves)
    return logits.detach(), trace, traced[: len(states)], traced[len(states) :]


class _Traced(torch.autograd.Function):
    """States and gradients as they come; on the way back their own gradients go to a function, and no further."""

    @staticmethod
    def forward(ctx, function, *values):
        ctx.function = function
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx, *directions):
        half = len(directions) // 2
        ctx.function(directions[:half], directions[half:])
        return (None,) * (1 + len(directions))


def _steps(states, directions, batch: Batch) -> torch.Tensor:
    """For each image the factor of its directions that moves its visual tokens' states by STEP of their length: [B]."""
    index, (rows, length) = batch["visual_index"], batch["input_ids"].shape

    def squares(parts) -> torch.Tensor:
        hidden, *deepstack = (part.float() for part in parts)
        tokens = sum(part.square().sum(dim=-1) for part in (hidden.flatten(0, 1)[index], *deepstack))  # [V]
        return tokens.new_zeros(rows).index_add(0, index // length, tokens)

    return STEP * (squares(states) / squares(directions).clamp_min(1e-30)).sqrt()
