"""Which weights train: freezing the vision encoder, low-rank adapters and their merging."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen3VLForConditionalGeneration


def freeze_vision(network: Qwen3VLForConditionalGeneration, frozen: bool) -> None:
    """Stop or resume training of the vision encoder, its mergers included."""
    network.model.visual.requires_grad_(not frozen)


def add_lora(network: Qwen3VLForConditionalGeneration, rank: int, narrow: bool) -> None:
    """Put low-rank adapters (Hu et al., "LoRA", 2021), which start as no change, beside the language model's layers.

    All else is frozen; `narrow` keeps it in bfloat16.
    """
    if narrow:
        network.to(torch.bfloat16)
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model\.layers\..*\.({names})")
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merged_weights(network: Qwen3VLForConditionalGeneration) -> dict[str, torch.Tensor] | None:
    """The weights with adapters added in, under their plain names; None if there are no adapters."""
    adapted = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    if not adapted:
        return None
    weights = {}
    for name, value in network.state_dict().items():
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if layer:
            delta = adapted[layer].get_delta_weight("default")
            value = (value.to(delta) + delta).to(value)
            name = f"{layer}.{kind}"
        weights[name] = value
    return weights
