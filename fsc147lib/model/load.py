"""Load Qwen3-VL: the real one from a hub id or a folder, or a tiny one of the same classes.

A folder is not believed: no code of its own runs, nothing is unpickled, and what does not fit together is refused.

Left out: the forward pass (`forward`), and `Qwen3VLProcessor`, which cannot be built without torchvision:
ids are made in `prompt` and `collate`, pixels as the library's PIL processor makes them.
"""

import json
import math
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from PIL import Image
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file, find_adapter_config_file, logging

from ..files import read_manifest
from .device import free_models
from .network import CountingModel, ModelError, Recipe
from .prompt import IMAGE_TOKEN, chat_text, question, tokenize

KINDS = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}
"""model_type in config.json: class of the network."""

SHIPPED = Path(__file__).parent / "weights"
"""Small models that come with the package, a folder each: tiny and tiny-dual."""

RANDOM = "tiny-random"
"""tiny with random weights: Qwen3-VL with every part that the real one has, in two million parameters."""

RANDOM_RECIPE = Recipe(learning_rate=1e-3, train_vision=True)
"""What it trains with by default: it has no weights beside which that could be written."""

TEMPLATE_SECONDS = 10
"""A chat template that is not filled in by then never ends."""

NO_NETWORK = "With no network, copy the model's folder to this machine and give its path, or use 'tiny': it is at hand."


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | torch.device = "cpu"
) -> CountingModel:
    """Load a model, its tokenizer and its image processor.

    Args:
        name: "tiny" (trained on counts alone), "tiny-dual" (on both losses), "tiny-random" (untrained), none of
            which needs a download; a folder; or a hub id such as "Qwen/Qwen3-VL-2B-Instruct".
        dtype: of the weights; float32 to train (bfloat16 weights lose small updates).
        seed: of the random weights of "tiny-random".
        device: that the weights are read to, and checked on.

    Raises:
        ModelError: missing folder, not a Qwen3-VL, quantised weights, an adapter beside the weights, a hub that cannot
            be reached, or files that are damaged or not of one model: tensors that are missing, left over, misshapen or
            not finite, a tokenizer without what a prompt needs, an image processor that cuts other patches.
    """
    free_models()  # the one before, of which two may have no room
    found, verbosity = _find(name), logging.get_verbosity()
    refusal = None
    logging.set_verbosity_error()  # what else is to be said of the weights is said below
    try:
        read_manifest(found)
        config = PreTrainedConfig.get_config_dict(found)[0]
        if refusal := _refusal(found, config):
            raise ModelError(refusal)
        kind = KINDS[config["model_type"]]
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
        if not tokenizer.chat_template:  # older Qwen-VL folders keep it with the processor
            text = Path(cached_file(found, "chat_template.json")).read_text()
            tokenizer.chat_template = json.loads(text)["chat_template"]
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(found)
        if str(name) == RANDOM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = kind(kind.config_class.from_pretrained(found)).to(device, dtype)
        else:
            network, about = kind.from_pretrained(
                found, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
                device_map={"": device},
            )  # fmt: skip
            _check_weights(network, about)
        _check_tokenizer(tokenizer, network.config)
        _check_pixels(image_processor, network.config.vision_config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library below has types of its own
        cure = "\nCopy all files of one model's folder anew."
        if refusal:
            cure = ""  # it says its own
        elif not Path(found).is_dir():
            cure = f"\nIs it spelled right, and is the hub reachable? {NO_NETWORK}"
        raise ModelError(f"cannot load {found}: {' '.join(str(error).split())[:500]}{cure}") from error
    finally:
        logging.set_verbosity(verbosity)
    recipe = RANDOM_RECIPE if str(name) == RANDOM else Recipe.read(found)
    return CountingModel(network, tokenizer, image_processor, recipe)


def count_parameters(name: str | Path) -> int:
    """Of a model by its name, from its config alone; raises as `load_model` does."""
    found = _find(name)
    try:
        config = PreTrainedConfig.get_config_dict(found)[0]
        if refusal := _refusal(found, config):
            raise ModelError(f"cannot load {found}: {refusal}")
        kind = KINDS[config["model_type"]]
        with torch.device("meta"):
            return kind(kind.config_class.from_pretrained(found)).num_parameters()
    except OSError as error:
        raise ModelError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from error


def _find(name: str | Path) -> str:
    """The folder, or the hub id; a missing path differs from a hub id by its form."""
    if str(name) in (RANDOM, *(folder.name for folder in SHIPPED.iterdir())):
        return str(SHIPPED / ("tiny" if str(name) == RANDOM else name))
    if Path(name).is_dir():
        if (Path(name) / "best" / "config.json").is_file():
            raise ModelError(f"{name} is the folder of a run: give one of its checkpoints, {name}/best or {name}/last")
        if not (Path(name) / "config.json").is_file():
            what = "give a folder that holds a saved model, for example runs/x/best"
            raise ModelError(f"{name} has no config.json: {what}")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        what = "give 'tiny', an existing folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct"
        raise ModelError(f"there is no model folder {name}: {what}")
    elif not try_to_load_from_cache(str(name), "config.json"):
        try:  # once: the libraries below ask six times, with pauses, before they say that nobody answers
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:  # each version of the client has its own types
            answer = f"the hub does not answer ({type(error).__name__})"
            raise ModelError(f"there is no folder {name}, and {answer}. {NO_NETWORK}") from error
    return str(name)


# --- What is refused


def _refusal(found: str, config: dict) -> str | None:
    """Why a model is none that this library can train, and what to do; None where it seems to be one."""
    kind = config.get("model_type")
    if kind not in KINDS:
        known = " or ".join(map(repr, KINDS))
        return f"this is a {kind!r} model: this library knows Qwen3-VL (model_type {known}) only"
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if (quantised := part.get("quantization_config")) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            what = f"its weights are quantised ({method or 'no quant_method'}, says quantization_config in config.json)"
            return f"{what}: give the model in bfloat16 or float32 that they were made from"
    if find_adapter_config_file(found):  # transformers would apply it in silence
        what = "an adapter lies beside the weights (adapter_config.json)"
        return f"{what}: merge it into them (peft's merge_and_unload) and save, or move its files away"
    return None


def _check_weights(network: Qwen3VLForConditionalGeneration, about: dict) -> None:
    """Raise ModelError where a tensor had to be filled with random numbers, was left over, or is not finite."""
    wrong = {
        "that the weights lack": about["missing_keys"],
        "that the model has no place for": about["unexpected_keys"],
        "of another shape than config.json gives them": [key for key, *_ in about["mismatched_keys"]],
        "that hold NaN or infinity": [
            name for name, weight in network.named_parameters() if not all(map(torch.isfinite, torch.aminmax(weight)))
        ],
    }
    for what, names in wrong.items():
        if names:
            raise ModelError(f"there are tensors {what}: {len(names)}, such as {min(names)}")


def _check_tokenizer(tokenizer, config: Qwen3VLConfig) -> None:
    """Raise ModelError unless a prompt with an image can be written, and an answer ends."""
    for token, name in ((tokenizer.pad_token_id, "pad token"), (tokenizer.eos_token_id, "end-of-turn token")):
        if token is None:
            raise ModelError(f"the tokenizer has no {name}")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image is None or image == tokenizer.unk_token_id:
        raise ModelError(f"the tokenizer has no {IMAGE_TOKEN}: is tokenizer.json in its place, and that of a Qwen3-VL?")
    if image != config.image_token_id:
        raise ModelError(f"image_token_id in config.json is {config.image_token_id}, but the tokenizer's is {image}")
    if len(tokenizer) > config.text_config.vocab_size:
        raise ModelError(f"{len(tokenizer)} tokens in tokenizer.json, but {config.text_config.vocab_size} embeddings")
    try:
        with _at_most(TEMPLATE_SECONDS):
            tokenize(tokenizer, "objects", 1)
            heard = question("objects") in chat_text(tokenizer, "objects")
    except Exception as error:
        raise ModelError(f"the chat template cannot be used ({type(error).__name__}: {error})") from error
    if not heard:
        raise ModelError("the chat template leaves out the question")


@contextmanager
def _at_most(seconds: float):
    """End Python code that takes longer with a TimeoutError, where system and thread allow it."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check_pixels(processor: Qwen2VLImageProcessorPil, vision) -> None:
    """Raise ModelError unless the image processor cuts the patches that the vision encoder takes."""
    if vision.hidden_size % (4 * vision.num_heads):
        raise ModelError(f"{vision.num_heads} heads do not divide the vision encoder's width of {vision.hidden_size}")
    fixed = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
             "temporal_patch_size": vision.temporal_patch_size}  # fmt: skip
    for name, wanted in fixed.items():
        if getattr(processor, name) != wanted:
            raise ModelError(f"{name} is {getattr(processor, name)} in the preprocessor, but {wanted} in config.json")
    mean, std, size = processor.image_mean, processor.image_std, processor.size
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, [*mean, *std])) and min(std) > 0):
        raise ModelError(f"image_mean {mean} and image_std {std} must be three finite numbers each, image_std above 0")
    if not 0 < size["shortest_edge"] <= size["longest_edge"] < math.inf:
        raise ModelError(f"size is {size}, but 0 < shortest_edge <= longest_edge is needed (numbers of pixels)")
    Image.Resampling(processor.resample)
