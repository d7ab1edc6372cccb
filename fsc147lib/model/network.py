"""A Qwen3-VL with what it needs to read a question about an image: which of its weights train, how it is saved.

Left out: where its weights come from (`load`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..files import new_folder
from .attention import IMPLEMENTATIONS


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """What a model trains with unless told otherwise; a file beside its weights."""

    learning_rate: float = 1e-5
    train_vision: bool = False

    FILE = "recipe.json"

    @classmethod
    def read(cls, folder: str | Path) -> "Recipe":
        """The recipe in a model's folder, or a ModelError; without the file, that of a large trained model."""
        path = Path(folder) / cls.FILE
        if not path.is_file():
            return cls()
        try:
            recipe = cls(**json.loads(path.read_text()))
            if not (0 < recipe.learning_rate < 1 and isinstance(recipe.train_vision, bool)):
                raise ValueError(f"{recipe} is out of range")
            return recipe
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}): restore it, or remove it") from error


@dataclass
class CountingModel:
    """A Qwen3-VL network with what it needs to read a question about an image."""

    network: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        self.network.set_attn_implementation(IMPLEMENTATIONS)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), config, tokenizer and image processor, all or nothing.

        The folder loads again with `load_model`, and in plain transformers.
        """
        with new_folder(Path(folder), replace=True) as draft:
            self.write_into(draft)

    def write_into(self, folder: Path) -> None:
        """Write the parts into a folder that nobody reads yet (`checkpoint` puts more beside them)."""
        self.network.save_pretrained(folder, state_dict=merged_weights(self.network))
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / Recipe.FILE).write_text(json.dumps(asdict(self.recipe)))


def compile_layers(network: Qwen3VLForConditionalGeneration, rows_of: tuple[int, ...] = ()) -> None:
    """Compile the layers, each kind once for all sizes; a saved or copied network is not compiled.

    A hook tells the layers `rows_of` to hand on their attention rows, so these are compiled in parts, below the hook.
    Raises torch's public limit of kinds: passes with a gradient and without, of text, images and parts, make a dozen.
    """
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 32)
    parts = [*network.model.visual.blocks, network.model.language_model.norm]
    for i, layer in enumerate(network.model.language_model.layers):
        parts += layer.children() if i in rows_of else [layer]
    for part in parts:
        part.compile(dynamic=True)


def freeze_vision(network: Qwen3VLForConditionalGeneration, frozen: bool) -> None:
    """Stop or resume training of the vision encoder, its mergers included."""
    network.model.visual.requires_grad_(not frozen)


def save_memory(
    network: Qwen3VLForConditionalGeneration, lora: int | None, checkpointing: bool, precision: str
) -> None:
    """Prepare a network to train in less memory: with `checkpointing` activations are computed a second time.

    With a rank `lora` low-rank adapters (Hu et al., "LoRA", 2021), which start as no change, train beside the language
    model's layers; all else is frozen, and kept in training's `precision` if that is "bf16" or "fp16".
    """
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    if not lora:
        return
    if precision == "bf16":
        network.to(torch.bfloat16)
    elif precision == "fp16":  # matrices alone: the sum that runs through all layers would overflow
        for module in [*network.model.language_model.layers.modules(), *network.model.visual.blocks.modules()]:
            if isinstance(module, nn.Linear):
                module.half()
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=rf".*language_model\.layers\..*\.({names})")
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
