"""Load Qwen3-VL: the real one from a hub id or a folder, or a tiny one of the same classes.

Whatever the name, the same `CountingModel` comes back, and all code after it is the same.

Left out: the forward pass (`forward`), and `Qwen3VLProcessor`, which cannot be built without torchvision:
ids are made in `prompt` and `collate`, pixels as the library's PIL processor makes them.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from .network import CountingModel, ModelError, Recipe
from .tiny import tiny_model

SHIPPED = Path(__file__).parent / "weights"
"""Small models that come with the package, a folder each: tiny and tiny-dual."""

RANDOM = "tiny-random"
"""The same network untrained."""


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> CountingModel:
    """Load a model, its tokenizer and its image processor.

    Args:
        name: "tiny" (trained on counts alone), "tiny-dual" (on both losses), "tiny-random" (untrained), none of
            which needs a download; a folder; or a hub id such as "Qwen/Qwen3-VL-2B-Instruct".
        dtype: of the weights; float32 to train (bfloat16 weights lose small updates).
        seed: of the random weights of "tiny-random".

    Raises:
        ModelError: missing folder, not a Qwen3-VL, or a hub that cannot be reached.
    """
    if str(name) == RANDOM:
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
    return CountingModel(network, tokenizer, image_processor, Recipe.read(name))


def _find(name: str | Path) -> str:
    """The folder, or the hub id; a missing path differs from a hub id by its form."""
    if str(name) in (folder.name for folder in SHIPPED.iterdir()):
        return str(SHIPPED / name)
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
