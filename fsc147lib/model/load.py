"""Load a Qwen3-VL; no code in its folder runs, nothing is unpickled, and parts that do not fit are refused."""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from huggingface_hub import constants, get_session, try_to_load_from_cache
from peft import LoraConfig, LoraModel, PeftConfig, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file, find_adapter_config_file, logging
from tyro.conf import Positional

from ..files import new_folder, read_manifest
from .device import TYPES, free_models
from .network import ADAPTERS, PREFIX, CountingModel, ModelError, Recipe
from .prompt import IMAGE_TOKEN, chat_text, question, tokenize

CLASSES = transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLMoeForConditionalGeneration
KINDS = {network.config_class.model_type: network for network in CLASSES}  # by model_type in config.json
SHIPPED = Path(__file__).parent / "weights"  # folders of the models that come with the library
RANDOM = "tiny-random"  # "tiny" with random weights: every part of a Qwen3-VL in two million parameters
RANDOM_RECIPE = Recipe(learning_rate=1e-3, train_vision=True)
NO_NETWORK = "With no network, copy the model's folder to this machine and give its path, or use 'tiny': it is at hand."


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | torch.device = "cpu"
) -> CountingModel:
    """Load a model with its tokenizer and image processor; a ModelError says what is missing, damaged or unfit.

    `name` is a folder, a hub id such as "Qwen/Qwen3-VL-2B-Instruct", or a model that comes with the library: "tiny",
    trained on counts alone, "tiny-dual", trained on both losses, or "tiny-random", whose weights follow from `seed`.
    A folder of adapters is loaded with the model that its adapter_config.json names, and merged into it in float32.
    Training needs float32: bfloat16 weights lose small updates.
    """
    free_models()  # two models may have no room
    found, is_random = _find(name), str(name) == RANDOM
    if config := _adapters(found):
        return _load_merged(found, config, dtype, device)
    with _one_error(found):
        read_manifest(found)
        kind = _network_class(found)
        tokenizer = transformers.AutoTokenizer.from_pretrained(found, trust_remote_code=False)
        if not tokenizer.chat_template:  # older Qwen-VL folders keep it with the processor
            text = Path(cached_file(found, "chat_template.json")).read_text()
            tokenizer.chat_template = json.loads(text)["chat_template"]
        # not Qwen3VLProcessor, which cannot be built without torchvision
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(found)
        if is_random:
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
    return CountingModel(network, tokenizer, image_processor, RANDOM_RECIPE if is_random else Recipe.read(found))


def recipe_of(name: str | Path) -> Recipe:
    """A model's defaults in training, read without its weights; raises as `load_model` does."""
    return RANDOM_RECIPE if str(name) == RANDOM else Recipe.read(_find(name))


def count_parameters(name: str | Path) -> int:
    """Parameters of a model, counted from its config alone; raises as `load_model` does."""
    found = _find(name)
    if config := _adapters(found):
        return count_parameters(base_name(config.base_model_name_or_path))
    with _one_error(found), torch.device("meta"):
        kind = _network_class(found)
        return kind(kind.config_class.from_pretrained(found)).num_parameters()


@dataclass(frozen=True)
class MergeConfig:
    """Write a model with its adapters merged into its weights, for plain transformers."""

    model: Positional[str]  # Folder of adapters, such as runs/train/best.
    out: Positional[Path]  # Folder to make.
    dtype: Literal["fp32", "bf16"] = "fp32"  # Type of the weights.  bf16 takes half the room and rounds small updates.


def merge(config: MergeConfig) -> None:
    """The command `merge`.  FileExistsError if `out` has content, and a ModelError as of `load_model`."""
    with new_folder(config.out) as draft:
        load_model(config.model, TYPES[config.dtype]).write_into(draft)


def base_name(name: str | Path) -> str:
    """A model's name for adapter_config.json, with a folder's whole path; a ModelError for a folder of adapters."""
    found = _find(name)
    if _adapters(found):
        raise ModelError(f"{name} holds adapters, below which others cannot lie: `fsc147lib merge` makes whole weights")
    return str(Path(found).absolute()) if found == str(name) and Path(found).is_dir() else str(name)


def _adapters(found: str) -> LoraConfig | None:
    """The adapter_config.json of a folder without config.json; a ModelError if its adapters cannot be used."""
    folder = Path(found)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    with _one_error(found):
        read_manifest(found)
        config = PeftConfig.from_pretrained(found)
        _need(isinstance(config, LoraConfig), f"its adapters are {config.peft_type}: LoRA's can be used")
        _need(not [*folder.glob("model*.safetensors")], "an adapter lies beside the weights: move its files away")
    return config


def load_adapters(network, folder: str | Path) -> tuple[list[str], list[str]]:
    """Load a folder's adapters; returns names of the network that it lacks, and its names that the network lacks."""
    weights = load_file(Path(folder) / ADAPTERS)
    return set_peft_model_state_dict(network, {name.removeprefix(PREFIX): value for name, value in weights.items()})


def _load_merged(found: str, config: LoraConfig, dtype: torch.dtype, device: str | torch.device) -> CountingModel:
    try:
        model = load_model(base_name(config.base_model_name_or_path))
    except ModelError as error:
        named = "base_model_name_or_path in adapter_config.json"
        raise ModelError(f"{found} holds adapters, but their model ({named}) cannot be loaded: {error}") from error
    with _one_error(found):
        adapters = LoraModel(model.network, config, "default")
        names, unexpected = load_adapters(model.network, found)
        missing = [name for name in names if "lora_" in name]
        _check_weights(model.network, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": []})
        model.network = adapters.merge_and_unload().eval().requires_grad_(True).to(device, dtype)
    return model


def _find(name: str | Path) -> str:
    """The folder or the hub id of a model; a ModelError if neither can be used."""
    name, folder = str(name), Path(name)
    if name == RANDOM or name in {shipped.name for shipped in SHIPPED.iterdir()}:
        return str(SHIPPED / ("tiny" if name == RANDOM else name))
    if folder.is_dir():
        if (folder / "best").is_dir():
            raise ModelError(f"{name} is the folder of a run: give one of its checkpoints, {name}/best or {name}/last")
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{name} has no config.json: give the folder of a saved model, such as runs/x/best")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        cure = "give 'tiny', an existing folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct"
        raise ModelError(f"there is no model folder {name}: {cure}")
    elif not try_to_load_from_cache(name, "config.json"):
        try:  # transformers would ask six times, with pauses
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:  # each version of the client has its own types
            answer = f"the hub does not answer ({type(error).__name__})"
            raise ModelError(f"there is no folder {name}, and {answer}. {NO_NETWORK}") from error
    return name


@contextmanager
def _one_error(found: str):
    """A context in which errors become a ModelError with a cure, and transformers prints nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # each library has its own types
        elsewhere, here = "Is it spelled right, and is the hub reachable?", "Copy all files of one model's folder anew."
        cure = here if Path(found).is_dir() else f"{elsewhere} {NO_NETWORK}"
        raise ModelError(f"cannot load {found}: {' '.join(str(error).split())[:500]}\n{cure}") from error
    finally:
        logging.set_verbosity(verbosity)


def _network_class(found: str):
    """The class of a network, by its config.json; a ModelError if such a model cannot be trained here."""
    config, refused = transformers.PreTrainedConfig.get_config_dict(found)[0], f"cannot load {found}: "
    kind = config.get("model_type")
    if kind not in KINDS:
        known = " or ".join(map(repr, KINDS))
        raise ModelError(f"{refused}this is a {kind!r} model: this library knows Qwen3-VL (model_type {known}) only")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("quantization_config") is not None:
            method = dict(part["quantization_config"]).get("quant_method", "no quant_method")
            cure = "give the model in bfloat16 or float32 that they were made from"
            raise ModelError(
                f"{refused}its weights are quantised ({method}, says quantization_config in config.json): {cure}"
            )
    if find_adapter_config_file(found):  # transformers would apply it in silence
        cure = "merge it into them (peft's merge_and_unload) and save, or move its files away"
        raise ModelError(f"{refused}an adapter lies beside the weights (adapter_config.json): {cure}")
    return KINDS[kind]


def _need(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _check_weights(network, about: dict) -> None:
    weights = network.named_parameters()
    wrong = {
        "that the weights lack": about["missing_keys"],
        "that the model has no place for": about["unexpected_keys"],
        "of another shape than config.json gives them": [key for key, *_ in about["mismatched_keys"]],
        "that hold NaN or infinity": [name for name, x in weights if not all(map(torch.isfinite, torch.aminmax(x)))],
    }
    for what, names in wrong.items():
        _need(not names, f"there are tensors {what}: {len(names)}, such as {min(names, default=None)}")


def _check_tokenizer(tokenizer, config) -> None:
    _need(tokenizer.pad_token_id is not None, "the tokenizer has no pad token")
    _need(tokenizer.eos_token_id is not None, "the tokenizer has no end-of-turn token")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    known, cure = image not in (None, tokenizer.unk_token_id), "is tokenizer.json in its place, and that of a Qwen3-VL?"
    _need(known, f"the tokenizer has no {IMAGE_TOKEN}: {cure}")
    wanted, rows = config.image_token_id, config.text_config.vocab_size
    _need(image == wanted, f"image_token_id in config.json is {wanted}, but the tokenizer's is {image}")
    _need(len(tokenizer) <= rows, f"{len(tokenizer)} tokens in tokenizer.json, but {rows} embeddings")
    try:
        tokenize(tokenizer, "objects", 1)
        heard = question("objects") in chat_text(tokenizer, "objects")
    except Exception as error:
        raise ValueError(f"the chat template cannot be used ({type(error).__name__}: {error})") from error
    _need(heard, "the chat template leaves out the question")


def _check_pixels(processor, vision) -> None:
    heads, width = vision.num_heads, vision.hidden_size  # a head's width holds sines and cosines of rows and columns
    _need(width % (4 * heads) == 0, f"{heads} heads do not divide the vision encoder's width of {width}")
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        ours, wanted = getattr(processor, name), getattr(vision, name.replace("merge", "spatial_merge"))
        _need(ours == wanted, f"{name} is {ours} in the preprocessor, but {wanted} in config.json")
    mean, std, size = processor.image_mean, processor.image_std, processor.size
    finite = len(mean) == len(std) == 3 and all(map(math.isfinite, [*mean, *std])) and min(std) > 0
    _need(finite, f"image_mean {mean} and image_std {std} must be three finite numbers each, image_std above 0")
    ordered = 0 < size["shortest_edge"] <= size["longest_edge"] < math.inf
    _need(ordered, f"size is {size}, but 0 < shortest_edge <= longest_edge is needed (numbers of pixels)")
    Image.Resampling(processor.resample)  # a ValueError if there is no such filter
