"""Fixtures: a small drawn root, the tiny model, and a batch of images of very different sizes."""

import gc
import json
import os
import shutil
import subprocess
import sys

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the library does, which is imported after torch here

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain import plain_network
from teaching import teach
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from fsc147lib.data.faults import ANNOTATIONS, SPLITS
from fsc147lib.data.fsc147 import FSC147
from fsc147lib.data.scenes import make_dataset
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import normalised_pixels
from fsc147lib.model.load import load_model
from fsc147lib.model.network import CountingModel


def pytest_collection_finish():
    gc.freeze()  # or each search for unused models looks through all that was imported: a third of a second


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A drawn root with 24 train, 8 val and 8 test pictures."""
    return make_dataset(tmp_path_factory.mktemp("data") / "root", 24, 8, 8, seed=1)


@pytest.fixture(scope="session")
def half_empty_root(root, tmp_path_factory):
    """The same with every second picture's dots and boxes taken away, the first of a split's first of all."""
    copied = shutil.copytree(root, tmp_path_factory.mktemp("data") / "half-empty")
    entries, splits = (json.loads((copied / file).read_text()) for file in (ANNOTATIONS, SPLITS))
    for names in splits.values():
        for name in names[::2]:
            entries[name].update(points=[], box_examples_coordinates=[])
    (copied / ANNOTATIONS).write_text(json.dumps(entries))
    return copied


@pytest.fixture(scope="session")
def untouched_tiny():
    return load_model("tiny-random")


@pytest.fixture
def tiny(untouched_tiny):
    """A fresh tiny model: a test may change its weights."""
    return deepcopy(untouched_tiny)


@pytest.fixture(scope="session")
def tiny_folder(untouched_tiny, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    untouched_tiny.save(folder)
    return folder


@pytest.fixture
def plain(tiny_folder):
    """Its network as transformers alone loads it, with eager attention."""
    return plain_network(tiny_folder, "eager")


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """A small network over Qwen's real vocabulary, as the hub's folder has it: same ids, same tokenizer class."""
    tool = Path(__file__).parents[2] / "shared" / "tools" / "qwen_tokenizer.py"
    if not tool.is_file():
        pytest.skip("Qwen's vocabulary is written by ../shared/tools/qwen_tokenizer.py, which is not here")
    folder = tmp_path_factory.mktemp("qwen")
    done = subprocess.run([sys.executable, tool, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"Qwen's vocabulary cannot be had: {done.stderr.strip().splitlines()[-1]}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    later = ["<tool_call>", "</tool_call>", *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
             "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in later])  # 151657 to 151668
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tiny = load_model("tiny-random")
    config = Qwen3VLConfig(**tiny.network.config.to_dict())  # without the attention that the library chose
    text = config.text_config
    text.vocab_size, text.eos_token_id, text.pad_token_id = 151936, tokenizer.eos_token_id, tokenizer.pad_token_id
    for token in ("image", "video"):
        setattr(config, f"{token}_token_id", tokenizer.convert_tokens_to_ids(f"<|{token}_pad|>"))
    for side in ("start", "end"):
        setattr(config, f"vision_{side}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{side}|>"))
    torch.manual_seed(0)
    network = Qwen3VLForConditionalGeneration(config)
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    CountingModel(network, tokenizer, tiny.image_processor).save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    return folder


@pytest.fixture
def qwen(qwen_folder):
    """That model, fresh."""
    return load_model(qwen_folder)


@pytest.fixture(scope="session")
def mixed_samples(root, tmp_path_factory):
    """Four samples: two drawn ones, a tall and a very wide picture; counts of one, two and three digits."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = list(FSC147(root, "train"))[:2]
    for i, (size, count) in enumerate((((128, 320), 7), ((640, 96), 123))):
        rng = np.random.default_rng(i)
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        points = rng.uniform((0, 0), size, (count, 2)).astype(np.float32)
        samples.append(replace(samples[0], name=path.name, points=points, image_path=path))
    return samples


@pytest.fixture(scope="session")
def empty_samples(mixed_samples):
    """Two pictures with nothing to count."""
    dots, boxes = np.zeros((0, 2), np.float32), np.zeros((0, 4), np.float32)
    return [replace(sample, name=f"empty-{sample.name}", points=dots, boxes=boxes) for sample in mixed_samples[1:3]]


@pytest.fixture(scope="session")
def lessons(mixed_samples):
    """Weights of the tiny model after so many steps of learning the mixed samples by heart: half, nearly and wholly."""
    model, learnt, states = load_model("tiny-random"), 0, {}
    for steps in (12, 40, 60):
        teach(model, mixed_samples, steps - learnt)
        learnt, states[steps] = steps, {key: value.clone() for key, value in model.network.state_dict().items()}
    return states


@pytest.fixture
def taught(tiny, lessons):
    """The tiny model after so many of those steps."""

    def at(steps):
        tiny.network.load_state_dict(lessons[steps])
        tiny.network.eval()
        return tiny

    return at


@pytest.fixture
def batch(tiny, mixed_samples):
    """As transformers' own forward takes it: with pixels as numbers, not bytes."""
    made = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    return {**made, "pixel_values": normalised_pixels(made)}


@pytest.fixture
def float64(monkeypatch):
    """Every float32 that a module asks for becomes float64, so that finite differences are sharp.

    Qwen3-VL's norms and rotations cast to float32 by name; without this their rounding would drown
    the difference of two nearly equal losses.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
