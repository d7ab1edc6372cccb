"""Load Qwen3-VL: the real one from a hub id or a folder, or a tiny one of the same classes.

Whatever the name, the same `CountingModel` comes back, and all code after it is the same.

Left out: the forward pass (`forward`), and `Qwen3VLProcessor`, which cannot be built without torchvision:
ids are made in `prompt` and `collate`, pixels as the library's PIL processor makes them.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from huggingface_hub import constants, get_session, try_to_load_from_cache
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from .attention import use_fast_attention
from .files import new_draft, replace_folder
from .prompt import ANSWER, QUESTION

TINY = "tiny"


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


@dataclass
class CountingModel:
    """A Qwen3-VL network with what it needs to read a question about an image."""

    network: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), config, tokenizer and image processor, all or nothing.

        The folder loads again with `load_model`, and in plain transformers with
        `AutoModelForImageTextToText.from_pretrained`.
        """
        draft = new_draft(Path(folder))
        self.write_into(draft)
        replace_folder(draft, Path(folder))

    def write_into(self, folder: Path) -> None:
        """Write the parts into a folder that nobody reads yet (`checkpoint` puts more beside them)."""
        self.network.save_pretrained(folder, state_dict=merged_weights(self.network))
        for part in (self.tokenizer, self.image_processor):
            part.save_pretrained(folder)


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> CountingModel:
    """Load a model, its tokenizer and its image processor.

    Args:
        name: "tiny" (random weights, nothing to download), a folder, or a hub id such as
            "Qwen/Qwen3-VL-2B-Instruct".
        dtype: of the weights; float32 to train (bfloat16 weights lose small updates).
        seed: of the random weights of "tiny".

    Raises:
        ModelError: missing folder, not a Qwen3-VL, or a hub that cannot be reached.
    """
    if str(name) == TINY:
        return tiny_model(dtype, seed)
    name = _find(name)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "qwen3_vl":
            raise ModelError(
                f"{name} is a {config.model_type!r} model: this library knows Qwen3-VL (model_type 'qwen3_vl') only"
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = tokenizer.chat_template or _processor_chat_template(name)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        network = Qwen3VLForConditionalGeneration.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"cannot load {name}: {str(error).strip().splitlines()[0]}\n"
            "If it is a hub id: is it spelled right, and is the hub reachable? With no network, copy the model's "
            "folder to this machine and give its path, or use 'tiny', which needs no download."
        ) from error
    use_fast_attention(network)
    _embed_patches_fast(network)
    return CountingModel(network, tokenizer, image_processor)


def _find(name: str | Path) -> str:
    """The folder, or the hub id; a path that is not there is told from a hub id by its form."""
    if Path(name).is_dir():
        if (Path(name) / "best" / "config.json").is_file():
            raise ModelError(f"{name} is the folder of a run: give one of its checkpoints, {name}/best or {name}/last")
        if not (Path(name) / "config.json").is_file():
            raise ModelError(
                f"{name} has no config.json: give a folder that holds a saved model, for example runs/x/best"
            )
        return str(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise ModelError(
            f"there is no model folder {name}: give 'tiny', an existing folder, "
            "or a hub id such as Qwen/Qwen3-VL-2B-Instruct"
        )
    if not try_to_load_from_cache(str(name), "config.json"):
        _need_hub(name)
    return str(name)


def _need_hub(name: str | Path) -> None:
    """Ask the hub once: the libraries below ask six times, with pauses, before they say that nobody answers."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # each version of the client has its own types
        raise ModelError(
            f"there is no folder {name}, and the hub does not answer ({type(error).__name__}). With no network, copy "
            "the model's folder to this machine and give its path, or use 'tiny', which needs no download."
        ) from error


def _processor_chat_template(name: str) -> str:
    """The chat template where older Qwen-VL folders keep it: with the processor, not the tokenizer."""
    path = cached_file(name, "chat_template.json")
    return json.loads(Path(path).read_text())["chat_template"]


def make_accelerator(precision: str) -> Accelerator:
    """Device and precision: "bf16" is autocast, "auto" that on a GPU and fp32 elsewhere; weights keep their type."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    AcceleratorState._reset_state()  # it is shared, and would refuse a second run of another precision in one notebook
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
    )


def default_workers() -> int:
    """Processes that read images: one less than there are cores, up to 8, beside a GPU; else none."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


def _embed_patches_fast(network: Qwen3VLForConditionalGeneration) -> None:
    """Embed patches by a matrix product: the library's Conv3d covers each patch with exactly one kernel.

    The sums are the same; on two CPU cores the tiny model's whole training step takes 0.79 of the time.
    """
    patch_embed = network.model.visual.patch_embed

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:  # [P, 3 * 2 * 16 * 16] -> [P, hidden]
        weight = patch_embed.proj.weight.flatten(1)
        return F.linear(pixel_values.to(weight.dtype), weight, patch_embed.proj.bias)

    patch_embed.forward = forward


def freeze_vision(network: Qwen3VLForConditionalGeneration, frozen: bool) -> None:
    """Stop or resume training of the vision encoder, its mergers included."""
    network.model.visual.requires_grad_(not frozen)


def add_lora(network: Qwen3VLForConditionalGeneration, rank: int, narrow: bool) -> None:
    """Put low-rank adapters (Hu et al., "LoRA", 2021) beside the language model's linear layers; all else is frozen.

    Args:
        rank: of the adapters; they start as no change.
        narrow: keep the frozen weights in bfloat16.
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


# --- The tiny model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
WORDS = "apples lemons leaves buttons bricks starfish hex nuts candies user assistant"
"""Words that are worth one token each, with those of the question; all other text is spelled in pieces."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the words of the prompt; any text can be written, digits stay single."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| |[^\s\p{L}\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([QUESTION, ANSWER, *WORDS.split(), *(f" {word}" for word in WORDS.split())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """Qwen3-VL with every part that the real one has, in about a million parameters.

    The weights start wider than a large model's (0.05 instead of 0.02): a narrow one learns faster so.
    Two heads of 32 in the vision encoder count as well as four of 16, at 0.81 of the attention's time on a CPU.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"], "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.05,
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=True,
    )  # fmt: skip


def random_network(config: Qwen3VLConfig, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    """A network of random weights with this library's attention."""
    network = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    use_fast_attention(network)
    _embed_patches_fast(network)
    return network


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> CountingModel:
    """A Qwen3-VL small enough for a laptop, with random weights; `load_model("tiny")` calls this."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = random_network(config, dtype)
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 384},
    )  # fmt: skip
    return CountingModel(network, tokenizer, image_processor)
