"""Which weights train: freezing the vision encoder, low-rank adapters and their merging."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Qwen3VLForConditionalGeneration


def freeze_vision(network: Qwen3VLForConditionalGeneration, frozen: bool) -> None:
    """Stop or resume training of the vision encoder, its mergers included."""
    network.model.visual.requires_grad_(not frozen)


def add_lora(network: Qwen3VLForConditionalGeneration, rank: int, precision: str = "no") -> None:
    """Put low-rank adapters (Hu et al., "LoRA", 2021), which start as no change, beside the language model's layers.

    All else is frozen, and kept in training's `precision` if that is "bf16" or "fp16".
    """
    if precision == "bf16":
        network.to(torch.bfloat16)
    elif precision == "fp16":  # matrices alone: the sum that runs through all layers would overflow
        for module in [*network.model.language_model.layers.modules(), *network.model.visual.blocks.modules()]:
            if isinstance(module, nn.Linear):
                module.half()
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model\.layers\..*\.({names})")
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_memory(
    network: Qwen3VLForConditionalGeneration, lora: int | None, checkpointing: bool, precision: str
) -> None:
    """Train adapters of a rank alone, if one is given, and compute activations a second time, if wanted."""
    if lora:
        add_lora(network, lora, precision)
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})


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
