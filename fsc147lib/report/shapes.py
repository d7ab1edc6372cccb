"""Models and pictures for measurements without a download: Qwen3-VL's shapes with random weights, drawn roots."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ..data import make_dataset
from ..data.faults import ANNOTATIONS, IMAGES, SPLITS
from ..model.load import load_model
from ..model.network import CountingModel

SMALL_ENCODER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_ENCODER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
SHAPES = {  # name: (width, inner width, layers and heads of the language model, vision encoder), as in config.json
    "qwen3-vl-2b": (2048, 6144, 28, 16, SMALL_ENCODER),
    "qwen3-vl-4b": (2560, 9728, 36, 32, SMALL_ENCODER),
    "qwen3-vl-8b": (4096, 12288, 36, 32, LARGE_ENCODER),
}


def load_or_shape(name: str, device: str = "cpu") -> CountingModel:
    """Load a model, or make one of SHAPES with random weights and the tiny model's tokenizer."""
    if name not in SHAPES:
        return load_model(name)
    width, inner, layers, heads, encoder = SHAPES[name]
    tiny, tied = load_model("tiny-random"), name != "qwen3-vl-8b"
    config = tiny.network.config.to_dict() | {"tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config["text_config"] |= {
        "vocab_size": 151936, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": rope,
        "initializer_range": 0.02, "tie_word_embeddings": tied,
    }  # fmt: skip
    config["vision_config"] |= encoder | {
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": width, "initializer_range": 0.02,
    }  # fmt: skip
    with torch.device(device):
        network = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    tiny.image_processor.size = {"shortest_edge": 65536, "longest_edge": 16777216}  # the real one's limits
    return CountingModel(network, tiny.tokenizer, tiny.image_processor)


def drawn_root(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Draw a root with a training picture of each size (height, width) in pixels; returns `root`."""
    make_dataset(root, len(sizes), 1, 1)
    entries, splits = (json.loads((root / file).read_text()) for file in (ANNOTATIONS, SPLITS))
    for name, (height, width) in zip(splits["train"], sizes, strict=True):
        image, entry = Image.open(root / IMAGES / name), entries[name]
        scale = np.array([width / image.width, height / image.height])
        for key in ("points", "box_examples_coordinates"):
            entry[key] = [(np.array(place) * scale).tolist() for place in entry[key]]
        image.resize((width, height)).save(root / IMAGES / name)
    (root / ANNOTATIONS).write_text(json.dumps(entries))
    return root
