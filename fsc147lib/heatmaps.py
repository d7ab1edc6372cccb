"""Where the model looks: from attention rows to a [B, 14, 14] heatmap that sums to 1.

The `attention` heatmap is the probability mass that goes from the positions which predict the count's
digits to the visual tokens, averaged over digits, layers and heads, moved to 14x14 by exact areas, and
renormalised.  It is differentiable, and it needs the answer's query rows only.

Left out: the losses, and how the rows are caught (`model.AttentionProbe`).
"""

import torch
from tqdm import tqdm

from .config import ConfigError
from .data import Batch, Collate, Sample, to_device
from .model import AttentionProbe, CountingModel, answer_logits, make_accelerator


def choose(network, layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The layers to look at: those asked for, or `default_layers`.

    Raises:
        ConfigError: the language model has no such layer or head.
    """
    text = network.config.text_config
    for name, chosen, number in (
        ("attention_layers", layers, text.num_hidden_layers),
        ("attention_heads", heads, text.num_attention_heads),
    ):
        if chosen is not None and not (chosen and all(0 <= one < number for one in chosen)):
            raise ConfigError(f"{name} is {chosen}, but this model has 0 to {number - 1}: choose at least one of them")
    return layers or default_layers(text.num_hidden_layers)


def default_layers(depth: int) -> tuple[int, ...]:
    """About four layers, evenly over the second half of the language model, where answers are put together."""
    return tuple(range(depth // 2, depth, max(1, depth // 7)))


def visual_mass(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention mass on the cells of the 14x14 grid, not renormalised.

    Args:
        rows: [B, ..., T] attention mass on every position of the sequence.
        batch: gives each visual token's place by `row_weights` and `column_weights`.

    Returns:
        [B, ..., 14, 14]; the sum is the mass on visual tokens, the rest went to text.
    """
    shape = (len(rows), *(1,) * (rows.ndim - 2))
    along_y, along_x = (batch[key].to(rows).unflatten(0, shape) for key in ("row_weights", "column_weights"))
    with torch.autocast(rows.device.type, enabled=False):  # in bf16 the product would lose mass
        return (along_y * rows.unsqueeze(-2)) @ along_x.transpose(-1, -2)


def _on_digits(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over the positions that predict a digit: [B, ..., A, T] -> [B, ..., T]."""
    weights = batch["digit_weights"].to(rows).unflatten(0, (len(rows), *(1,) * (rows.ndim - 3)))  # [B, ..., A]
    return (weights.unsqueeze(-1) * rows).sum(dim=-2)


def layer_head_maps(probe: AttentionProbe, batch: Batch) -> torch.Tensor:
    """What each layer and head looks at while it predicts the digits.

    Args:
        probe: after a forward pass that it asked for rows at `batch["answer_positions"]`.

    Returns:
        [B, L, H, 14, 14] attention mass, layers in the probe's order; sums are at most 1.
    """
    rows = torch.stack([probe.rows[layer] for layer in probe.layers], dim=1)  # [B, L, H, A, T]
    return visual_mass(_on_digits(rows, batch), batch)


def attention_heatmap(probe: AttentionProbe, batch: Batch, heads: tuple[int, ...] | None = None) -> torch.Tensor:
    """The `attention` heatmap of a forward pass.

    Args:
        probe: as for `layer_head_maps`.
        heads: which heads to average; None for all.

    Returns:
        [B, 14, 14], non-negative, each summing to 1; part of the graph where the pass has one.
    """
    rows = torch.stack([probe.rows[layer] for layer in probe.layers])  # [L, B, H, A, T]
    rows = rows.mean(dim=(0, 2)) if heads is None else rows[:, :, list(heads)].mean(dim=(0, 2))  # [B, A, T]
    mass = visual_mass(_on_digits(rows, batch), batch)  # [B, 14, 14]
    return mass / mass.sum(dim=(1, 2), keepdim=True)


def heatmap(network, batch: Batch, layers: tuple[int, ...] | None = None, heads: tuple[int, ...] | None = None):
    """One forward pass and its `attention` heatmap.

    Args:
        network: a Qwen3-VL with this library's attention (`load_model`).
        batch: from `Collate`, on the network's device.
        layers, heads: which to average; None for `default_layers` and all heads.

    Returns:
        [B, 14, 14] as `attention_heatmap`; under `torch.no_grad()` it keeps no graph.
    """
    probe = AttentionProbe(batch["answer_positions"], choose(network, layers, heads))
    answer_logits(network, batch, probe)
    return attention_heatmap(probe, batch, heads)


@torch.no_grad()
def look(
    model: CountingModel, samples: list[Sample], layers: tuple[int, ...] | None = None, batch_size: int = 16
) -> torch.Tensor:
    """Where a model's attention goes on some samples while it is told the right answer.

    Args:
        model: is moved to this machine's accelerator, if it has one, and put in eval mode.
        samples: with images.
        layers: None for `default_layers`.

    Returns:
        [N, L, H, 14, 14] float32 on the CPU: the attention mass of every layer and head.
    """
    accelerator = make_accelerator("auto")
    network = model.network.to(accelerator.device).eval()
    layers = choose(network, layers)
    collate = Collate(model.tokenizer, model.image_processor)
    maps = []
    for start in tqdm(range(0, len(samples), batch_size), desc="look", leave=False):
        batch = to_device(collate(samples[start : start + batch_size]), accelerator.device)
        probe = AttentionProbe(batch["answer_positions"], layers)
        with accelerator.autocast():
            answer_logits(network, batch, probe)
        maps.append(layer_head_maps(probe, batch).float().cpu())
    return torch.cat(maps)


def mean_map(maps: torch.Tensor) -> torch.Tensor:
    """The `attention` heatmaps [N, 14, 14], each summing to 1, of the layers and heads in maps [N, L, H, 14, 14]."""
    mean = maps.mean(dim=(1, 2))
    return mean / mean.sum(dim=(1, 2), keepdim=True)


def corner_share(maps: torch.Tensor) -> torch.Tensor:
    """How much of each head's attention to the image lies in the top-left cell: [N, L, H, 14, 14] -> mean [L, H].

    Even attention would give 1/196.  Qwen-VL is known to let attention sink there.
    """
    return (maps[..., 0, 0] / maps.sum(dim=(-1, -2)).clamp_min(1e-9)).mean(dim=0)
