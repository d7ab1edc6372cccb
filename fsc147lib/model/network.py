"""A Qwen3-VL with its tokenizer and image processor: saving, compiling, and the weights that train."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..files import new_folder
from .attention import IMPLEMENTATIONS
from .device import TYPES

ADAPTERS, PREFIX = "adapter_model.safetensors", "base_model.model."  # peft's names of the file, and in it


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


@dataclass(frozen=True)
class Recipe:
    """A model's defaults in training, from `recipe.json` beside its weights."""

    learning_rate: float = 1e-5  # of large trained models
    train_vision: bool = False

    @classmethod
    def read(cls, folder: str | Path) -> "Recipe":
        """The recipe in a model's folder, or the defaults if it has none; a ModelError if it is damaged."""
        path = Path(folder) / "recipe.json"
        try:
            recipe = cls(**json.loads(path.read_text())) if path.is_file() else cls()
            if not 0 < recipe.learning_rate < 1:
                raise ValueError(f"learning_rate is {recipe.learning_rate}, but must lie in 0..1")
            return recipe
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}): restore it, or remove it") from error


class PatchProduct(nn.Conv3d):
    """A Conv3d over patches that are as large as its kernel, computed as a matrix product; weights keep their names.

    On a CPU the convolution takes six times as long, a quarter of a step of `tiny`.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, device="meta")
        self.weight, self.bias, self.training = conv.weight, conv.bias, conv.training

    def forward(self, patches: torch.Tensor) -> torch.Tensor:  # [P, 3, 2, 16, 16] -> [P, C, 1, 1, 1]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


@dataclass
class CountingModel:
    """A Qwen3-VL network with its tokenizer and image processor."""

    network: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        self.network.set_attn_implementation(IMPLEMENTATIONS)
        patches = self.network.model.visual.patch_embed
        if type(patches.proj) is nn.Conv3d:
            patches.proj = PatchProduct(patches.proj)

    def save(self, folder: str | Path) -> None:
        """Write a folder for `load_model` or transformers, all or nothing; a folder that is there is replaced."""
        with new_folder(Path(folder), replace=True) as draft:
            self.write_into(draft)

    def write_into(self, folder: Path) -> None:
        """Write weights and config, or adapters as peft saves them, tokenizer, image processor and recipe."""
        if adapters := adapter_weights(self.network):
            vision = ["visual"] if any(".visual." in name for name in adapters) else None
            config = replace(self.network.peft_config["default"], modules_to_save=vision, inference_mode=True)
            config.save_pretrained(folder)  # makes the folder
            save_file(adapters, folder / ADAPTERS, {"format": "pt"})
        else:
            self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe)))


def compile_layers(network: nn.Module, rows_of: tuple[int, ...] = ()) -> None:
    """Compile the layers for all sizes; the layers in `rows_of` in parts, below the hook that asks for their rows."""
    # with and without gradient, text, images and parts make a dozen graphs
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 32)
    parts = [*network.model.visual.blocks, network.model.language_model.norm]
    for i, layer in enumerate(network.model.language_model.layers):
        parts += layer.children() if i in rows_of else [layer]
    for part in parts:
        part.compile(dynamic=True)


def freeze_vision(network: nn.Module, frozen: bool) -> None:
    """Stop or resume training of the vision encoder, its mergers included."""
    network.model.visual.requires_grad_(not frozen)


def save_memory(
    network: nn.Module, lora: int | None, checkpointing: bool, precision: str, base: str = "", keep_vision: bool = False
) -> None:
    """Prepare a network to train in less memory; with `checkpointing` activations are computed twice and not kept.

    With a rank `lora`, adapters (Hu et al., "LoRA", 2021) train in the language model's layers; all other weights are
    frozen, and stored in `precision`: "bf16", "fp16" or "fp32".  `keep_vision` leaves the vision encoder in float32, to
    train later.  `base` is the model's name for adapter_config.json.
    """
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    if not lora:
        return
    for name, weight in network.named_parameters():
        matrix = weight.ndim == 2 and (".layers." in name or ".blocks." in name)
        narrow = (
            precision == "bf16" or precision == "fp16" and matrix
        )  # in fp16 the sum through all layers would overflow
        if narrow and not (keep_vision and ".visual." in name):
            weight.data = weight.data.to(TYPES[precision])
    target = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=target, base_model_name_or_path=base)
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters of a network under peft's names, with the vision encoder if it trains; {} without adapters."""
    if not hasattr(network, "peft_config"):
        return {}
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)  # "auto" would ask the hub
    vision = network.model.visual
    if any(parameter.requires_grad for parameter in vision.parameters()):
        weights |= {f"model.visual.{name}": value for name, value in vision.state_dict().items()}
    return {PREFIX + name: value for name, value in weights.items()}
