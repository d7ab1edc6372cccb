"""Plain transformers beside the library: a network that it alone has loaded, the inputs it takes, its answers."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from fsc147lib.model.forward import normalised_pixels

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")


def plain_network(folder, attention="sdpa"):
    """Of a saved model's folder, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def plain_inputs(batch):
    """Ids, mask and pixels alone: places and image features are transformers' own to find."""
    return {key: batch[key] for key in INPUTS} | {"pixel_values": normalised_pixels(batch)}


def questions(batch, pad):
    """The questions alone, padded on the left, as `generate` wants them."""
    inputs, ends = plain_inputs(batch), (batch["answer_positions"][:, 0] + 1).tolist()
    for key, fill in (("input_ids", pad), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        rows = [F.pad(row[:end], (max(ends) - end, 0), value=fill) for row, end in zip(inputs[key], ends, strict=True)]
        inputs[key] = torch.stack(rows)
    return inputs


@torch.no_grad()
def generated(network, batch, tokenizer, longest):
    """Greedy answers of transformers' `generate`, each up to its end."""
    end, inputs = tokenizer.eos_token_id, questions(batch, tokenizer.pad_token_id)
    said = network.generate(
        **inputs, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in said]
